# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="untyped-decorator"
"""The kernels of `dora_compose`: a program walks tiles of ROWS x COLUMNS numbers.

Numbers are fp32 from the load on. The tile is fixed, not tuned at run time: the sums over rows then
have the same order, and the same bits, on every GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 2048 numbers for 128 threads: two loads of 16 bytes per thread and bf16 operand.
TILE = {"ROWS": 8, "COLUMNS": 256, "num_warps": 4}
# Tiles per program of the backward. Partial sums of the gain then are fp32 rows for every 32 rows
# of the gradient: 1 to 2 % of what the pass moves in bf16.
STEPS = 4


@triton.jit
def compose(
    base_ptr,
    lora_ptr,
    gain_ptr,
    bias_ptr,
    out_ptr,
    scale,
    rows,
    columns,
    WITH_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # row * columns passes 2^31
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    mask = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * columns + column[None, :]
    gain = tl.load(gain_ptr + column, mask=inside, other=1.0)[None, :]
    base = tl.load(base_ptr + at, mask=mask, other=0.0).to(tl.float32)
    lora = tl.load(lora_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y0 = base
    if WITH_BIAS:
        y0 -= tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    out = (gain - 1.0) * y0 + gain * (scale * lora)
    if WHOLE:
        out += base
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def compose_backward(
    grad_ptr,
    base_ptr,
    lora_ptr,
    gain_ptr,
    bias_ptr,
    d_base_ptr,
    d_lora_ptr,
    d_gain_ptr,
    sums_ptr,
    scale,
    rows,
    columns,
    WITH_GAIN: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * (STEPS * ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    gain = tl.load(gain_ptr + column, mask=inside, other=1.0)[None, :]
    bias = tl.zeros([1, COLUMNS], dtype=tl.float32)
    if WITH_BIAS:
        bias += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    d_gain = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * columns + column[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        d_base = (gain if WHOLE else gain - 1.0) * grad
        tl.store(d_base_ptr + at, d_base.to(d_base_ptr.dtype.element_ty), mask=mask)
        d_lora = gain * (scale * grad)
        tl.store(d_lora_ptr + at, d_lora.to(d_lora_ptr.dtype.element_ty), mask=mask)
        if WITH_GAIN:
            base = tl.load(base_ptr + at, mask=mask, other=0.0).to(tl.float32)
            lora = tl.load(lora_ptr + at, mask=mask, other=0.0).to(tl.float32)
            d_gain += (scale * lora + (base - bias)) * grad  # grad is 0 outside
        if WITH_BIAS:
            sums += grad
    at_sum = tl.program_id(0).to(tl.int64) * columns + column
    if WITH_GAIN:
        tl.store(d_gain_ptr + at_sum, tl.sum(d_gain, axis=0), mask=inside)
    if WITH_BIAS:
        tl.store(sums_ptr + at_sum, tl.sum(sums, axis=0), mask=inside)


def _grid(t: Tensor, rows: int) -> tuple[int, int]:
    columns = t.shape[-1]
    return triton.cdiv(t.numel() // columns, rows), triton.cdiv(columns, TILE["COLUMNS"])


def forward(
    base: Tensor, lora: Tensor, gain: Tensor, scale: float, bias: Tensor | None, whole: bool
) -> Tensor:
    """One launch over contiguous, not empty tensors of one device, checked by the caller."""
    out, columns = torch.empty_like(base), base.shape[-1]
    flags = {"WITH_BIAS": bias is not None, "WHOLE": whole}
    bias = gain if bias is None else bias.contiguous()  # never read, or as it is
    with torch.cuda.device_of(base):
        compose[_grid(base, TILE["ROWS"])](
            base, lora, gain, bias, out, scale, base.numel() // columns, columns, **flags, **TILE
        )
    return out


def backward(
    grad: Tensor,
    gain: Tensor,
    scale: float,
    whole: bool,
    base: Tensor | None,
    lora: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch, and PyTorch's sum over the partial sums of each program: no atomics."""
    d_base, d_lora, columns = torch.empty_like(grad), torch.empty_like(grad), grad.shape[-1]
    grid = _grid(grad, STEPS * TILE["ROWS"])
    flags = {"WITH_GAIN": base is not None, "WITH_BIAS": bias is not None, "WHOLE": whole}
    parts = [gain.new_empty(grid[0] if flags[f] else 0, columns) for f in list(flags)[:2]]
    read = (grad if base is None else base, grad if lora is None else lora)
    vectors = (gain, gain if bias is None else bias.contiguous())
    sizes = (grad.numel() // columns, columns)
    with torch.cuda.device_of(grad):
        compose_backward[grid](
            grad,
            *read,
            *vectors,
            d_base,
            d_lora,
            *parts,
            scale,
            *sizes,
            **flags,
            STEPS=STEPS,
            **TILE,
        )
    d_gain, sums = (part.sum(0) if len(part) else gain.new_empty(0) for part in parts)
    return d_base, d_lora, d_gain, sums
