"""BitFit: train the biases, freeze the rest (arXiv 2106.10199)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Generator, Tensor, nn

from ..recipe import Adapter, Recipe, require
from .replacement import backbone_parameters, replacement

if TYPE_CHECKING:
    from ..sites import Site


@dataclass(frozen=True, kw_only=True)
class BitFit(Recipe):
    """b' = a trained copy of b, for every bias b of the backbone unless `at` names others.

    Biases are the parameters called `bias` or `..._bias` (`in_proj_bias`, `q_bias`), those of norms
    among them. Source: arXiv 2106.10199. Raises `AdaptError` when the backbone has none.

    >>> BitFit().default_at(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
    ['0.bias', '1.bias']
    """

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        """A trainable copy of the bias."""
        return replacement(type(self).__name__, site, weight)

    def default_at(self, model: nn.Module) -> Sequence[str]:
        """Every bias."""
        names = [name for name in backbone_parameters(model) if _is_bias(name)]
        require(bool(names), f"BitFit: {type(model).__name__} has no parameter called bias")
        return names


def _is_bias(name: str) -> bool:
    own = name.rsplit(".", 1)[-1]
    return own == "bias" or own.endswith("_bias")
