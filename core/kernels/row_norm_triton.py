# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="untyped-decorator"
"""The kernel of `row_norm`: a program squares ROWS rows of W0 + s B A over SPAN columns.

The product is made tile by tile in registers, in fp32 and off the TF32 units, and never written.
Rows are cut into spans so that a weight of few rows keeps a GPU busy too; the spans' sums are added
by PyTorch. Neither tile nor span depend on the GPU: the bits are the same on every one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = {"ROWS": 32, "COLUMNS": 128, "RANKS": 16, "num_warps": 4, "num_stages": 2}
SPAN = 512


@triton.jit
def squares(
    w0_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    scale,
    rows,
    columns,
    rank,
    row_stride,
    column_stride,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    row, column, one = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, RANKS)
    below, right = rows - tl.program_id(0) * ROWS, columns - tl.program_id(1) * SPAN
    # Where a tile begins takes 64 bits; within one 32 are enough, and spare registers.
    top, start = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64) * SPAN
    w0_ptr += top * row_stride + start * column_stride
    a_ptr += start
    b_ptr += top * rank
    inside = (row < below)[:, None]
    sums = tl.zeros([ROWS], dtype=tl.float32)
    for first in range(0, tl.minimum(SPAN, right), COLUMNS):
        within = (column < right - first)[None, :]
        update = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        a_at = a_ptr
        for low in range(0, rank, RANKS):
            there = one < rank - low
            at_b = b_ptr + row[:, None] * rank + (low + one)[None, :]
            at_a = a_at + one[:, None] * columns + column[None, :]
            b = tl.load(at_b, mask=inside & there[None, :], other=0.0).to(tl.float32)
            a = tl.load(at_a, mask=there[:, None] & within, other=0.0).to(tl.float32)
            update = tl.dot(b, a, update, input_precision="ieee")
            a_at += RANKS * columns
        at = w0_ptr + row[:, None] * row_stride + column[None, :] * column_stride
        w = tl.load(at, mask=inside & within, other=0.0).to(tl.float32)
        w += scale * update
        sums += tl.sum(w * w, axis=1)
        w0_ptr += COLUMNS * column_stride
        a_ptr += COLUMNS
    tl.store(out_ptr + start // SPAN * rows + top + row, sums, mask=row < below)


def forward(w0: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """One launch over matrices that are not empty, W0 of any strides, checked by the caller."""
    a, b = a.contiguous(), b.contiguous()
    rows, columns = w0.shape
    grid = triton.cdiv(rows, TILE["ROWS"]), triton.cdiv(columns, SPAN)
    sums = torch.empty(grid[1], rows, dtype=torch.float32, device=w0.device)
    rank = len(a) if scale else 0  # 0 * NaN would be NaN
    sizes = (rows, columns, rank, *w0.stride())
    with torch.cuda.device_of(w0):
        squares[grid](w0, a, b, sums, scale, *sizes, SPAN=SPAN, **TILE)
    return sums.sum(0).sqrt()
