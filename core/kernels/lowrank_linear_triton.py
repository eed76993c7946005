# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="untyped-decorator"
"""The kernels of `lowrank_linear`: one product seeded by the branch, one pass over dY.

Operands are multiplied as they are, sums and everything behind them are fp32. What a tuner may
choose does not change the order of a sum: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .lowrank_orders import Call

DEPTH = 64  # columns of x and W0 per step, the same in all configurations: the sum keeps its order
MOST_RANKS = 32  # per step: twice as many spill in fp32 on sm_80
# Tiles of the whole product; in 16 bits the last holds 96 KiB on an NVIDIA GPU, less than any has.
WHOLE = [
    triton.Config({"ROWS": 64, "COLUMNS": 64}, num_warps=4, num_stages=3),
    triton.Config({"ROWS": 128, "COLUMNS": 64}, num_warps=4, num_stages=3),
    triton.Config({"ROWS": 128, "COLUMNS": 128}, num_warps=8, num_stages=3),
]
# Tiles beside a base, which is read and written once: small, as nothing is read again.
BESIDE = [
    triton.Config({"ROWS": 32, "COLUMNS": 64}, num_warps=4, num_stages=2),
    triton.Config({"ROWS": 64, "COLUMNS": 64}, num_warps=8, num_stages=2),
]
SIZES = ["bucket", "d_in", "d_out", "rank"]  # tuned for; tokens by powers of two
GROUP = 8  # blocks of rows that share a block of W0 in the cache
# One pass over dY: sums of Z are partial per 256 columns, those of dB per 64 rows times the steps
# of a program, whose number depends on the sizes alone.
PASS = {"ROWS": 64, "COLUMNS": 256, "num_warps": 4, "num_stages": 2}
PROGRAMS, MOST_STEPS = 256, 16


@triton.jit
def product(
    x_ptr,
    w_ptr,
    v_ptr,
    b_ptr,
    weights_ptr,
    gain_ptr,
    bias_ptr,
    base_ptr,
    y_ptr,
    scale,
    tokens,
    d_in,
    d_out,
    rank,
    w_row,
    w_column,
    base_row,
    bucket,
    WITH_WEIGHTS: tl.constexpr,
    WITH_GAIN: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    WITH_BASE: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr = False,
):
    down, across = tl.cdiv(tokens, ROWS), tl.cdiv(d_out, COLUMNS)
    band, inside_band = tl.program_id(0) // (GROUP * across), tl.program_id(0) % (GROUP * across)
    high = min(down - band * GROUP, GROUP)
    row = (band * GROUP + inside_band % high).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (inside_band // high) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = (row < tokens)[:, None], column < d_out
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, rank, RANKS):
        k = start + tl.arange(0, RANKS)
        in_rank = k < rank
        v = tl.load(v_ptr + row[:, None] * rank + k[None, :], in_rows & in_rank[None, :], 0.0)
        b_at = b_ptr + column[:, None] * rank + k[None, :]
        b = tl.load(b_at, in_columns[:, None] & in_rank[None, :], 0.0)
        if WITH_WEIGHTS:
            weights = tl.load(weights_ptr + k, in_rank, 0.0)
            v = (v.to(tl.float32) * weights[None, :]).to(v.dtype)
        if UPCAST:
            v, b = v.to(tl.float32), b.to(tl.float32)
        total = tl.dot(v, tl.trans(b), total, input_precision="ieee")
    total *= scale
    if WITH_BASE:
        at = row[:, None] * base_row + column[None, :]
        total += tl.load(base_ptr + at, in_rows & in_columns[None, :], 0.0).to(tl.float32)
    else:
        wide = column.to(tl.int64)[:, None] * w_row
        for start in range(0, d_in, DEPTH):
            k = start + tl.arange(0, DEPTH)
            in_depth = (k < d_in)[None, :]
            x = tl.load(x_ptr + row[:, None] * d_in + k[None, :], in_rows & in_depth, 0.0)
            w_at = w_ptr + wide + k[None, :] * w_column
            w = tl.load(w_at, in_columns[:, None] & in_depth, 0.0)
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    bias = tl.zeros([COLUMNS], dtype=tl.float32)
    if WITH_BIAS:
        bias += tl.load(bias_ptr + column, in_columns, 0.0).to(tl.float32)
    if WITH_GAIN:
        if WITH_BASE:
            total -= bias[None, :]
        total *= tl.load(gain_ptr + column, in_columns, 0.0)[None, :]
    if WITH_GAIN or not WITH_BASE:
        total += bias[None, :]
    y_at = y_ptr + row[:, None] * d_out + column[None, :]
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), in_rows & in_columns[None, :])


@triton.jit
def one_pass(
    grad_ptr,
    v_ptr,
    b_ptr,
    gain_ptr,
    z_ptr,
    d_b_ptr,
    scale,
    tokens,
    d_out,
    rank,
    steps,
    WITH_GAIN: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr = False,
):
    column, k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANKS)
    in_columns, in_rank = column < d_out, (k < rank)[None, :]
    # The rows of B, and of its gradient, that belong to these columns of dY.
    at_b = column[:, None] * rank + k[None, :]
    b = tl.load(b_ptr + at_b, in_columns[:, None] & in_rank, 0.0)
    gain = tl.full([COLUMNS], 1.0, dtype=tl.float32)
    if WITH_GAIN:
        gain *= tl.load(gain_ptr + column, in_columns, 0.0)
        b = (b.to(tl.float32) * gain[:, None]).to(b.dtype)
    if UPCAST:
        b = b.to(tl.float32)
    d_b = tl.zeros([COLUMNS, RANKS], dtype=tl.float32)
    first = tl.program_id(1).to(tl.int64) * steps * ROWS
    z_part = z_ptr + tl.program_id(0).to(tl.int64) * tokens * rank
    for step in range(steps):
        row = first + step * ROWS + tl.arange(0, ROWS)
        in_rows = (row < tokens)[:, None]
        at = row[:, None] * d_out + column[None, :]
        grad = tl.load(grad_ptr + at, in_rows & in_columns[None, :], 0.0)
        at_v = row[:, None] * rank + k[None, :]
        v = tl.load(v_ptr + at_v, in_rows & in_rank, 0.0)
        if UPCAST:
            grad, v = grad.to(tl.float32), v.to(tl.float32)
        z = tl.dot(grad, b, input_precision="ieee")
        tl.store(z_part + at_v, z * scale, in_rows & in_rank)
        d_b = tl.dot(tl.trans(grad), v, d_b, input_precision="ieee")
    d_b *= scale * gain[:, None]
    d_b_part = d_b_ptr + tl.program_id(1).to(tl.int64) * d_out * rank
    tl.store(d_b_part + at_b, d_b, in_columns[:, None] & in_rank)


whole = triton.autotune(WHOLE, key=SIZES)(product)
beside = triton.autotune(BESIDE, key=SIZES)(product)


def ranks_of(rank: int) -> int:
    """Ranks per step: a power of two from 16, which is what matrix units multiply at least."""
    power: int = triton.next_power_of_2(rank)
    return min(MOST_RANKS, max(16, power))


def forward(call: Call, v: Tensor) -> Tensor:
    """One launch over contiguous, not empty tensors of one device, checked by the caller."""
    x, b, base = call.x, call.b.to(call.x.dtype), call.base
    (tokens, rank), (d_in, d_out) = v.shape, (x.shape[1], len(b))
    y = torch.empty(tokens, d_out, dtype=x.dtype, device=x.device)
    # A transposed W0 (GPT-2's) is read as it lies.
    w = x if base is not None else call.weight if 1 in call.weight.stride() else None
    w = call.weight.contiguous() if w is None else w
    # A part of a projection's output is read where it lies.
    base = base if base is None or base.stride(1) == 1 else base.contiguous()
    optional = {"WEIGHTS": call.weights, "GAIN": call.gain, "BIAS": call.bias, "BASE": base}
    read = [x if t is None else t for t in optional.values()]  # x is never read there
    kernel = whole if base is None else beside

    def grid(options):
        return (triton.cdiv(tokens, options["ROWS"]) * triton.cdiv(d_out, options["COLUMNS"]),)

    with torch.cuda.device_of(x):
        kernel[grid](
            x,
            w,
            v,
            b,
            *read,
            y,
            call.scale,
            tokens,
            d_in,
            d_out,
            rank,
            *w.stride(),
            d_out if base is None else base.stride(0),
            max(16, triton.next_power_of_2(tokens)),
            **{f"WITH_{n}": t is not None for n, t in optional.items()},
            GROUP=GROUP,
            DEPTH=DEPTH,
            RANKS=ranks_of(rank),
        )
    return y


def backward(call: Call, grad: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One launch, and PyTorch's sums over the partial sums of each program: no atomics."""
    (tokens, d_out), rank, b = grad.shape, v.shape[1], call.b.to(grad.dtype)
    across, down = triton.cdiv(d_out, PASS["COLUMNS"]), triton.cdiv(tokens, PASS["ROWS"])
    steps = min(MOST_STEPS, max(1, across * down // PROGRAMS))
    chunks = triton.cdiv(down, steps)
    z = torch.empty(across, tokens, rank, dtype=torch.float32, device=grad.device)
    d_b = torch.empty(chunks, d_out, rank, dtype=torch.float32, device=grad.device)
    gain = grad if call.gain is None else call.gain.contiguous()
    with torch.cuda.device_of(grad):
        one_pass[(across, chunks)](
            grad,
            v,
            b,
            gain,
            z,
            d_b,
            call.scale,
            tokens,
            d_out,
            rank,
            steps,
            WITH_GAIN=call.gain is not None,
            RANKS=ranks_of(rank),
            **PASS,
        )
    return z.sum(0), d_b.sum(0)
