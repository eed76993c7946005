"""Operands of a low-rank linear layer, and its formula without any choice of order."""

from __future__ import annotations

import torch
from torch import Tensor

Operands = dict[str, Tensor | None]
SCALE, KEEP_SCALE = 0.75, 2.0


def lowrank_case(
    dtype: torch.dtype, tokens: tuple[int, ...] = (2, 3), sizes: tuple[int, int, int] = (6, 5, 2)
) -> dict[str, Tensor]:
    """Every operand; sizes are d_in, d_out and the rank."""
    (d_in, d_out, rank), made = sizes, torch.Generator().manual_seed(sum(tokens) + sum(sizes))
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float64).to(of)

    return {
        "x": normal(*tokens, d_in),
        "w0": normal(d_out, d_in) / max(1, d_in) ** 0.5,
        "a": normal(rank, d_in) / max(1, d_in) ** 0.5,
        "b": normal(d_out, rank),
        "bias": normal(d_out),
        "base": normal(*tokens, d_out),
        "weights": 2.0 ** torch.arange(rank).remainder(3).sub(1).to(wide),  # exact in every dtype
        "gain": 1 + 0.1 * normal(d_out, of=wide),
        "keep": torch.rand(*tokens, d_in, generator=made) < 0.5,
    }


def formula(
    x: Tensor,
    w0: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    weights: Tensor | None = None,
    gain: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """g (x W0^T + s ((keep x) A^T p) B^T) + bias; a base is x W0^T + bias."""
    hidden = (x if keep is None else x * keep * KEEP_SCALE) @ a.mT
    branch = SCALE * (hidden if weights is None else hidden * weights) @ b.mT
    if base is not None:
        frozen = base if bias is None or gain is None else base - bias
    else:
        assert w0 is not None
        frozen = x @ w0.mT
    y = (frozen + branch) * (1 if gain is None else gain)
    return y if bias is None or (base is not None and gain is None) else y + bias
