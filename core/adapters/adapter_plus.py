"""Adapter+ (arXiv 2406.06820): a bottleneck after every block, scaled channel by channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Generator, Tensor, nn

from ..recipe import Adapter, Recipe, require_rank
from .bottleneck import Bottleneck, Projections, add_bottleneck, transformer_blocks

if TYPE_CHECKING:
    from ..layers import FrozenLayer
    from ..sites import Site

SPREAD: Final = 0.01  # standard deviation of A and B at the start, cut at twice that


@dataclass(frozen=True, kw_only=True)
class AdapterPlus(Recipe):
    """u = Block(x); y = u + s * (B gelu(A u + a) + b), A [r, d], B [d, r] and s [d] per channel.

    u is the block's output, its residual sums included ("post-adapter"). A and B are drawn from
    N(0, 0.01^2) cut at two standard deviations, a = b = 0 and s = 1, so step 0 is close to the
    frozen backbone but not equal to it. Trained per block: 2 d r + r + 2 d.

    What is known: the placement, the channel-wise scale and the start are written from memory of
    the paper; neither it nor its code was read for this. They fit its count on ViT-B: 0.20 M at
    r = 8 with VTAB-1k's mean head of 38,045 numbers, 0.19 M without s. The stochastic depth on
    adapters, with which the authors train, is left out.

    Raises `AdaptError` for a setting out of range and for a model without a list `blocks`.

    >>> from polyadapt.core import AdapterPlus, Site
    >>> site = Site("blocks.0", None, None, None, "block", (768,), "output", "a whole module")
    >>> 12 * sum(p.numel() for p in AdapterPlus(rank=8).build(site, None, None).parameters())
    165984
    """

    rank: int = 8

    def __post_init__(self) -> None:
        require_rank("AdapterPlus", self.rank)

    @property
    def identity(self) -> bool:
        """No: A and B are both small and not zero."""
        return False

    def bottleneck(self) -> Bottleneck:
        """The adapter without the scale of its channels, in the terms of `Bottleneck`."""
        return Bottleneck(rank=self.rank, placement="serial")

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        tensors = self.bottleneck().start(site, generator)
        for matrix in (tensors.down, tensors.up):
            nn.init.trunc_normal_(
                matrix, std=SPREAD, a=-2 * SPREAD, b=2 * SPREAD, generator=generator
            )
        return AdapterPlusAdapter(self.bottleneck(), tensors, site.name)

    def default_at(self, model: nn.Module) -> Sequence[str]:
        return transformer_blocks(model)


class AdapterPlusAdapter(Adapter):
    """The bottleneck and the scale of its channels at one block."""

    def __init__(self, recipe: Bottleneck, tensors: Projections, where: str) -> None:
        super().__init__()
        self.recipe = recipe
        self.where = where
        assert tensors.down_bias is not None
        assert tensors.up_bias is not None
        self.down = nn.Parameter(tensors.down)
        self.down_bias = nn.Parameter(tensors.down_bias)
        self.up = nn.Parameter(tensors.up)
        self.up_bias = nn.Parameter(tensors.up_bias)
        self.scale = nn.Parameter(torch.ones_like(tensors.up_bias))

    def output(self, x: Tensor, y: Tensor, layer: FrozenLayer) -> Tensor:
        """y [..., d] -> y' of y's shape and dtype."""
        # s (B h + b) = (s B) h + s b: scaling d (r + 1) numbers instead of every token's d.
        up, shift = self.scale[:, None] * self.up, self.scale * self.up_bias
        scaled = Projections(self.down, up, self.down_bias, shift, None, None)
        return add_bottleneck(self.recipe, scaled, x, y, self.training, self.where)
