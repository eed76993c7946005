"""AdaptFormer (arXiv 2205.13535): a bottleneck parallel to the MLP branch of every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Generator, Tensor, nn

from ..recipe import Adapter, Recipe, require_finite, require_rank
from .bottleneck import Bottleneck, require_fraction, transformer_blocks

if TYPE_CHECKING:
    from ..sites import Site


@dataclass(frozen=True, kw_only=True)
class AdaptFormer(Recipe):
    """x2 = x1 + mlp(LN2 x1) + scale * (B drop(relu(A x1 + a)) + b), A [r, d] and B [d, r].

    x1 is the residual state that enters the MLP branch, before the block's own LN2. `scale` is
    absolute. A is uniform in +-1 / sqrt(d), a = B = b = 0, so step 0 is the frozen backbone
    exactly. Trained per block: 2 d r + r + d; `norm` adds 2 d.

    What is known: only later code was read (Bi-AdaptFormer, MoSA), not the paper. It feeds the
    branch x1 itself, with scale 0.1 and dropout 0.1. That the paper writes LN(x1), and that the
    authors' code has this norm as an option and leaves it off, is from memory: `norm=True` puts a
    LayerNorm of the adapter's own there. Published tables count 0.16 M numbers for r = 8 on ViT-B,
    which fits the form with biases and without the norm.

    Raises `AdaptError` for a setting out of range and for a model without a list `blocks`.

    >>> from polyadapt.core import AdaptFormer, Site
    >>> site = Site("blocks.0", None, None, None, "block", (768,), "output", "a whole module")
    >>> 12 * sum(p.numel() for p in AdaptFormer(rank=8).build(site, None, None).parameters())
    156768
    """

    rank: int = 64
    scale: float = 0.1
    dropout: float = 0.1
    norm: bool = False

    def __post_init__(self) -> None:
        require_rank("AdaptFormer", self.rank)
        require_finite("AdaptFormer", scale=self.scale)
        require_fraction("AdaptFormer", "dropout", self.dropout)

    def bottleneck(self) -> Bottleneck:
        """The same adapter in the terms of `Bottleneck`."""
        return Bottleneck(
            rank=self.rank,
            placement="parallel_ffn",
            activation="relu",
            norm=self.norm,
            scale=self.scale,
            dropout=self.dropout,
            down_init="kaiming",
        )

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        return self.bottleneck().build(site, weight, generator)

    def default_at(self, model: nn.Module) -> Sequence[str]:
        return transformer_blocks(model)
