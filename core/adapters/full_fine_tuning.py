"""Full fine-tuning with the interface of an adapter: the baseline that trains everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Generator, Tensor, nn

from ..recipe import Adapter, Recipe
from .replacement import backbone_parameters, replacement

if TYPE_CHECKING:
    from ..sites import Site


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(Recipe):
    """W' = a trained copy of W0, for every floating parameter unless `at` names fewer.

    The copy is what weight decay acts on, so training equals that of the unfrozen backbone; its
    buffers (batch-norm statistics) are not part of the set. Raises `AdaptError` for whole modules.

    >>> FullFineTuning().default_at(nn.Linear(2, 3))
    ['weight', 'bias']
    """

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        """A trainable copy of the parameter."""
        return replacement(type(self).__name__, site, weight)

    def default_at(self, model: nn.Module) -> Sequence[str]:
        """Every floating parameter."""
        return backbone_parameters(model)
