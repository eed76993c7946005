"""AdapterTune (arXiv 2603.14706; its repository now says ZILA): a bottleneck after each ViT block.

Deviation from the authors' code: biases do not decay unless `decay_biases` is set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Generator, Tensor, nn

from ..recipe import Adapter, Recipe, require, require_finite, require_rank
from .bottleneck import INITS, Bottleneck, require_choice, transformer_blocks

if TYPE_CHECKING:
    from ..sites import Site


@dataclass(frozen=True, kw_only=True)
class AdapterTune(Recipe):
    """u = Block(x); y = u + alpha * (B gelu(A u + a) + b), with A [r, d] and B [d, r].

    It sits on blocks 0, e, 2e, ... for every=e; a pattern given to `attach` replaces that choice.
    `alpha` is never divided by the rank. B = b = 0 at the start, so step 0 is the frozen backbone
    exactly; init="small" draws them from N(0, 1e-4^2) instead. Trained per block: 2 d r + r + d.
    The authors decay biases too (`decay_biases`), with AdamW, lr 1e-3 and weight decay 0.05.

    Raises `AdaptError` for a setting out of range and for a model without a list `blocks`.

    >>> import timm
    >>> vit = timm.create_model("vit_tiny_patch16_224", depth=5)
    >>> AdapterTune(every=2).default_at(vit)
    ['blocks.0', 'blocks.2', 'blocks.4']
    """

    rank: int = 16
    every: int = 1
    alpha: float = 1.0
    init: str = "zero"
    decay_biases: bool = False

    def __post_init__(self) -> None:
        whole = isinstance(self.every, int) and not isinstance(self.every, bool) and self.every >= 1
        require(whole, f"AdapterTune: every={self.every!r} is not allowed: a whole number from 1")
        require_rank("AdapterTune", self.rank)
        require_finite("AdapterTune", alpha=self.alpha)
        require_choice("AdapterTune", "init", self.init, INITS)

    def bottleneck(self) -> Bottleneck:
        """The same adapter in the terms of `Bottleneck`."""
        return Bottleneck(rank=self.rank, placement="serial", scale=self.alpha, init=self.init)

    @property
    def identity(self) -> bool:
        """Exactly the frozen backbone at the start, unless `init` is small."""
        return self.bottleneck().identity

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        return self.bottleneck().build(site, weight, generator)

    def default_at(self, model: nn.Module) -> Sequence[str]:
        return transformer_blocks(model)[:: self.every]

    def parameter_groups(
        self, adapters: Mapping[str, Adapter], lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """As every method's, or all tensors in one decaying group with `decay_biases`."""
        if not self.decay_biases:
            return super().parameter_groups(adapters, lr, weight_decay)
        tensors = [p for a in adapters.values() for p in a.parameters() if p.requires_grad]
        return [{"params": tensors, "lr": lr, "weight_decay": weight_decay}]


ZILA = AdapterTune  # the authors' later name for it
