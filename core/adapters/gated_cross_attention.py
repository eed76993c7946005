"""Gated cross-attention: blocks of a frozen decoder look at features of another kind.

Sources: Flamingo (arXiv 2204.14198) and, for Whisper and a speaker's lips, Whisper-Flamingo
(2406.10082): one such layer at the start of every decoder block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..errors import AdaptError, SiteError
from ..recipe import Adapter, Recipe, require

if TYPE_CHECKING:
    from ..layers import FrozenLayer
    from ..sites import Site


@dataclass(frozen=True)
class _Features:
    """What blocks look at: [b, f, d], and which of the f are there [b, f]."""

    values: Tensor
    seen: Tensor | None


_GIVEN: ContextVar[_Features | None] = ContextVar("features", default=None)


@contextmanager
def attending(features: Tensor, seen: Tensor | None = None) -> Iterator[None]:
    """Within, and in this thread only: what `GatedCrossAttention` looks at, v [b, f, d].

    `seen` [b, f] is False where a shorter sample is padded. A model that is called with n times as
    many rows (beam search) has n beside each other for every sample. `recompute` gives a block the
    same features again; a backward through other activation checkpoints must run within the
    context, and on the CPU.

    >>> with attending(torch.zeros(1, 50, 384)):
    ...     pass
    """
    if features.ndim != 3 or 0 in features.shape:
        raise AdaptError(f"features are [batch, frames, width], not {list(features.shape)}")
    if seen is not None and (seen.shape != features.shape[:2] or not bool(seen.any(1).all())):
        raise AdaptError(
            f"seen is {list(seen.shape)}: expected {list(features.shape[:2])}, and of each sample"
            " something is seen"
        )
    token = _GIVEN.set(_Features(features, seen))
    try:
        yield
    finally:
        _GIVEN.reset(token)


@dataclass(frozen=True, kw_only=True)
class GatedCrossAttention(Recipe):
    """x += tanh(g1) MHA(LN(x), v), then x += tanh(g2) FFN(LN(x)), before each block; g = 0.

    x [b, t, d] is what the block is called with, v [b, f, d] what `attending` gave: it has a clock
    of its own, and no positions are added. d / `head_width` heads, the key without bias, FFN d to
    4 d to d with GELU: 12 d^2 + 12 d + 2 numbers per block (2406.10082). Exactly the frozen
    backbone at the start, when of its tensors only the gates have a gradient. Not mergeable.

    Our choice: matrices start uniform in +-1/sqrt(d_in), biases at 0. Raises `SiteError` for a site
    that is no block, a width that `head_width` does not divide, and at a call without features
    (`activate(model, None)` is the backbone without them).

    >>> from polyadapt.core import Site
    >>> site = Site("decoder.blocks.0", None, None, None, "block", (768,), "output", "a module")
    >>> sum(p.numel() for p in GatedCrossAttention().build(site, None, None).parameters())
    7087106
    """

    head_width: int = 64

    def __post_init__(self) -> None:
        whole = isinstance(self.head_width, int) and not isinstance(self.head_width, bool)
        require(
            whole and self.head_width >= 1,
            f"GatedCrossAttention: head_width={self.head_width!r} is not allowed: a whole number"
            " from 1",
        )

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        if site.kind != "block":
            raise SiteError(
                f"GatedCrossAttention: {site.name} is a {site.kind}: it acts before a whole block"
            )
        width = site.shape[0]
        if width % self.head_width:
            raise SiteError(
                f"GatedCrossAttention: {site.name} has {width} channels, which heads of"
                f" {self.head_width} do not divide: choose another head_width"
            )
        return GatedAdapter(width, width // self.head_width, site.name, generator)


class GatedAdapter(Adapter):
    """The cross-attention, the FFN and the two gates before one block."""

    def __init__(self, width: int, heads: int, where: str, generator: Generator | None) -> None:
        super().__init__()
        self.heads, self.where = heads, where
        self.attention_norm, self.ffn_norm = _norm(width), _norm(width)
        self.query = _linear(width, width, generator)
        self.key = _linear(width, width, generator, bias=False)
        self.value = _linear(width, width, generator)
        self.out = _linear(width, width, generator)
        self.up = _linear(width, 4 * width, generator)
        self.down = _linear(4 * width, width, generator)
        zero = torch.zeros(1, dtype=torch.float32, device="cpu")
        self.attention_gate, self.ffn_gate = nn.Parameter(zero), nn.Parameter(zero.clone())

    def enter(self, x: Tensor) -> Tensor:
        """x [b, t, d] -> what the block is called with."""
        given = self._given(x)
        attended = self._attended(_normed(x, self.attention_norm), given)
        x = x + self.attention_gate.tanh().to(x.dtype) * attended
        hidden = F.gelu(_mapped(_normed(x, self.ffn_norm), self.up))
        return x + self.ffn_gate.tanh().to(x.dtype) * _mapped(hidden, self.down)

    def output(self, x: Tensor, y: Tensor, layer: FrozenLayer) -> Tensor:
        """What the block returns is left alone."""
        return y

    def _given(self, x: Tensor) -> _Features:
        given = _GIVEN.get()
        if given is None:
            raise SiteError(
                f"{self.where} looks at features: call the model within `with attending(features)`,"
                " or without the set (activate(model, None))"
            )
        values = given.values
        if x.ndim != 3 or len(x) % len(values) or values.shape[2] != x.shape[-1]:
            raise SiteError(
                f"{self.where} was called with {list(x.shape)}, to look at features"
                f" {list(values.shape)}: samples and width must fit"
            )
        return given

    def _attended(self, x: Tensor, given: _Features) -> Tensor:
        values, mask = given.values.to(x.dtype), None
        q, k, v = (
            _mapped(t, m) for t, m in ((x, self.query), (values, self.key), (values, self.value))
        )
        rows = len(x) // len(values)
        if given.seen is not None:
            mask = given.seen.bool().repeat_interleave(rows, 0)[:, None, None]
        k, v = (t.repeat_interleave(rows, 0) if rows > 1 else t for t in (k, v))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return _mapped(heads.transpose(1, 2).flatten(2), self.out)


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, dtype=torch.float32, device="cpu")


def _linear(d_in: int, d_out: int, generator: Generator | None, *, bias: bool = True) -> nn.Linear:
    """Drawn from the generator alone: torch's own start would move the global random state."""
    made: nn.Linear = nn.utils.skip_init(
        nn.Linear, d_in, d_out, bias=bias, dtype=torch.float32, device="cpu"
    )
    with torch.no_grad():
        made.weight.uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=generator)
        if bias:
            made.bias.zero_()
    return made


def _mapped(x: Tensor, layer: nn.Linear) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def _normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Statistics stay fp32 under bf16."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gain, shift = norm.weight.to(wide), norm.bias.to(wide)
    return F.layer_norm(x.to(wide), x.shape[-1:], gain, shift, norm.eps).to(x.dtype)
