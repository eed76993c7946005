# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="untyped-decorator"
"""The kernel of `hadamard`: a program holds one row of n = K 2^m numbers as a tile [K, 2^m].

All in fp32: the butterflies are sums, and the product with H_K is kept off the TF32 units, which
would round the numbers to 10 bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def transform(
    x_ptr,
    matrix_ptr,
    out_ptr,
    scale,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    POWER: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    at = tl.program_id(0).to(tl.int64) * (K * POWER)
    at += row[:, None] * POWER + tl.arange(0, POWER)[None, :]
    mask = (row < K)[:, None] & (tl.arange(0, POWER) < POWER)[None, :]
    y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    # Each step pairs the halves and writes the pair as neighbours, which turns the bits of a
    # number's place by one: after all steps every bit was paired once and is where it was.
    for _ in tl.static_range(STEPS):
        u, v = tl.split(tl.permute(tl.reshape(y, [ROWS, 2, POWER // 2]), [0, 2, 1]))
        y = tl.reshape(tl.join(u + v, u - v), [ROWS, POWER])
    if K > 1:
        column = tl.arange(0, ROWS)
        inside = (row < K)[:, None] & (column < K)[None, :]
        entries = row[:, None] * K + column[None, :]
        h = tl.load(matrix_ptr + entries, mask=inside, other=0.0)
        y = tl.dot(h, y, input_precision="ieee")
    tl.store(out_ptr + at, (y * scale).to(out_ptr.dtype.element_ty), mask=mask)


def shape_of(size: int, k: int) -> dict[str, Any]:
    """The tile and the threads for a size: 32 numbers each, from one to eight warps."""
    rows = 1 if k == 1 else max(16, triton.next_power_of_2(k))
    power = size // k
    warps = min(8, max(1, rows * power // 1024))
    steps = power.bit_length() - 1
    return {"K": k, "ROWS": rows, "POWER": power, "STEPS": steps, "num_warps": warps}


def forward(x: Tensor, matrix: Tensor) -> Tensor:
    """One launch over the contiguous, not empty rows of x; matrix [K, K] in fp32 on its device."""
    out, size = torch.empty_like(x), x.shape[-1]
    with torch.cuda.device_of(x):
        transform[(x.numel() // size,)](
            x, matrix, out, 1 / math.sqrt(size), **shape_of(size, matrix.shape[0])
        )
    return out
