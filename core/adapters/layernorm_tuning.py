"""LayerNorm tuning: train the gains and biases of the norms, freeze the rest (arXiv 2312.11420)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Generator, Tensor, nn

from ..recipe import Adapter, Recipe, require
from .replacement import backbone_parameters, replacement

if TYPE_CHECKING:
    from ..sites import Site

# Norms over the features of one sample. Classes that do not derive from torch's (timm's RmsNorm,
# transformers' LlamaRMSNorm and T5LayerNorm) are known by name, since core imports neither.
_NAMED = re.compile(r"(Layer|Group|RMS|Rms|Simple)Norm")


@dataclass(frozen=True, kw_only=True)
class LayerNormTuning(Recipe):
    """gamma', beta' = trained copies, for every LayerNorm, GroupNorm and RMSNorm of the backbone.

    Batch norms are left out: their statistics belong to the data. Source: arXiv 2312.11420.
    Raises `AdaptError` when the backbone has none.

    >>> LayerNormTuning().default_at(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
    ['1.weight', '1.bias']
    """

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        """A trainable copy of a gain or a bias."""
        return replacement(type(self).__name__, site, weight)

    def default_at(self, model: nn.Module) -> Sequence[str]:
        """Every gain and bias of the norms."""
        names = [
            name
            for name in backbone_parameters(model)
            if is_feature_norm(model.get_submodule(name.rpartition(".")[0]))
        ]
        found = type(model).__name__
        require(bool(names), f"LayerNormTuning: {found} has no LayerNorm, GroupNorm or RMSNorm")
        return names


def is_feature_norm(module: nn.Module) -> bool:
    """A norm over the features of one sample: LayerNorm, GroupNorm, RMSNorm and their like."""
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        return True
    return any(_NAMED.search(cls.__name__) for cls in type(module).__mro__)
