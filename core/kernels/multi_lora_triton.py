# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="untyped-decorator"
"""The kernels of `multi_lora`: v = A x in fp32, then y + s B v; a program has rows of one set.

No sum is shared between programs, so that its order is fixed. Operands become fp32 at their load
and products of 16-bit ones run on the TF32 units, which hold their digits whole (10 of v's, where
bf16 would keep 7); both kernels wait for memory, not for products, at ranks that are served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .multi_lora import Sets
    from .segments import Segments

COLUMNS = 64  # of d_out per program of the second product
# The numbers of d_in per step of the first product, and the most of a rank per program of it and
# per step of the second: in fp32, whose products are unrolled, more would spill.
STEP = {"tf32": 64, "ieee": 32}


@triton.jit
def shrink(
    x_ptr,
    down_ptr,
    hidden_ptr,
    order_ptr,
    tiles_ptr,
    starts_ptr,
    ranks_ptr,
    width,
    tokens,
    largest,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    INNER: tl.constexpr,
):
    tile = tiles_ptr + 3 * tl.program_id(0)
    owner, end = tl.load(tile), tl.load(tile + 2)
    place = tl.load(tile + 1) + tl.arange(0, ROWS)
    here = place < end
    rank = tl.load(ranks_ptr + owner)
    r = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    held = r < rank
    if tl.load(tile + 1) < end and tl.program_id(1) * RANKS < rank:
        row = tl.load(order_ptr + place // tokens, mask=here, other=0) * tokens + place % tokens
        at_down = (tl.load(starts_ptr + owner) + r) * width
        hidden = tl.zeros([ROWS, RANKS], dtype=tl.float32)
        for begin in range(0, width, INNER):
            column = begin + tl.arange(0, INNER)
            inside = column < width
            at = row[:, None] * width + column[None, :]
            x = tl.load(x_ptr + at, mask=here[:, None] & inside[None, :], other=0.0)
            at = at_down[None, :] + column[:, None]
            a = tl.load(down_ptr + at, mask=held[None, :] & inside[:, None], other=0.0)
            hidden = tl.dot(x.to(tl.float32), a.to(tl.float32), hidden, input_precision=PRECISION)
        # Behind the rank are zeros, so that who reads them needs no mask of single numbers.
        tl.store(hidden_ptr + place[:, None] * largest + r[None, :], hidden, mask=here[:, None])


@triton.jit
def expand(
    y_ptr,
    up_ptr,
    hidden_ptr,
    out_ptr,
    order_ptr,
    tiles_ptr,
    starts_ptr,
    ranks_ptr,
    scales_ptr,
    width,
    tokens,
    largest,
    WITH_Y: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tiles_ptr + 3 * tl.program_id(0)
    owner, end = tl.load(tile), tl.load(tile + 2)
    place = tl.load(tile + 1) + tl.arange(0, ROWS)
    here = place < end
    if tl.load(tile + 1) < end:
        row = tl.load(order_ptr + place // tokens, mask=here, other=0) * tokens + place % tokens
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        rank, start = tl.load(ranks_ptr + owner), tl.load(starts_ptr + owner)
        delta = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for begin in range(0, rank, RANKS):
            r = begin + tl.arange(0, RANKS)
            at_hidden = place[:, None] * largest + r[None, :]
            v = tl.load(hidden_ptr + at_hidden, mask=here[:, None], other=0.0)
            at_up = (start + r)[:, None] * width + column[None, :]
            b = tl.load(up_ptr + at_up, mask=(r < rank)[:, None] & inside[None, :], other=0.0)
            delta = tl.dot(v, b.to(tl.float32), delta, input_precision=PRECISION)
        at = row[:, None] * width + column[None, :]
        mask = here[:, None] & inside[None, :]
        y = tl.zeros([ROWS, COLUMNS], dtype=out_ptr.dtype.element_ty)
        if WITH_Y:
            y = tl.load(y_ptr + at, mask=mask, other=0.0)
        if rank > 0:  # without a rank the bits of y: y + 0 would change -0
            changed = y.to(tl.float32) + tl.load(scales_ptr + owner) * delta
            y = changed.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, y, mask=mask)


def options_of(rank: int, dtype: torch.dtype, rows: int) -> dict[str, Any]:
    """What both kernels are compiled for: a tile, and the unit that multiplies."""
    # Of AMD's GPUs not all have such a unit.
    precision = "ieee" if dtype == torch.float32 or torch.version.hip else "tf32"
    warps = 8 if precision == "ieee" and rows > 16 else 4
    ranks = min(STEP[precision], max(16, triton.next_power_of_2(rank)))
    return {"PRECISION": precision, "ROWS": rows, "RANKS": ranks, "num_warps": warps}


def empty(like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """A buffer that the kernels fill."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def forward(x: Tensor, y: Tensor | None, sets: Sets, made: Segments) -> Tensor:
    """Two launches over contiguous, not empty x [m, t, d_in], y [m, t, d_out] or None for zeros."""
    ids, tokens, d_in = x.shape
    d_out, options = sets.up.shape[1], options_of(sets.rank, x.dtype, made.rows)
    blocks, inner = triton.cdiv(sets.rank, options["RANKS"]), STEP[options["PRECISION"]]
    largest = blocks * options["RANKS"]
    hidden = empty(x, torch.float32, ids * tokens, largest)
    out = empty(x, x.dtype, ids, tokens, d_out)
    tables = (made.order, made.tiles, sets.starts, sets.ranks)
    with torch.cuda.device_of(x):
        shrink[(len(made.tiles), blocks)](
            x, sets.down, hidden, *tables, d_in, tokens, largest, INNER=inner, **options
        )
        expand[(len(made.tiles), triton.cdiv(d_out, COLUMNS))](
            x if y is None else y,
            sets.up,
            hidden,
            out,
            *tables,
            sets.scales,
            d_out,
            tokens,
            largest,
            WITH_Y=y is not None,
            COLUMNS=COLUMNS,
            **options,
        )
    return out
