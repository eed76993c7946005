"""Each Triton launch of this library as a step, and what it would return, for counting.

Written from the kernels' grids: partial sums that programs write and PyTorch adds up are moved
twice. Tiles of an operand that several programs read are read once, as everywhere in the count.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from polyadapt.benchmarks.kernel_traffic import FP32, MATRIX, TF32, Launch, Step, step
from polyadapt.core.kernels import (
    dora_compose_triton,
    hadamard_triton,
    lowrank_linear_triton,
    multi_lora_triton,
    row_norm_triton,
)
from polyadapt.core.kernels.dora_compose_triton import STEPS, TILE
from polyadapt.core.kernels.lowrank_orders import Call
from polyadapt.core.kernels.multi_lora import Sets
from polyadapt.core.kernels.segments import Segments


def compose(
    base: Tensor, lora: Tensor, gain: Tensor, scale: float, bias: Tensor | None, whole: bool
) -> tuple[Tensor, Step]:
    """(g - 1) (y - b) + g s l [+ y]."""
    out = torch.empty_like(base)
    operations = (4 + (bias is not None) + whole) * base.numel()
    return out, step("dora_compose", (base, lora, gain, bias), (out,), operations)


def compose_backward(
    grad: Tensor,
    gain: Tensor,
    scale: float,
    whole: bool,
    base: Tensor | None,
    lora: Tensor | None,
    bias: Tensor | None,
) -> tuple[tuple[Tensor, ...], Step]:
    """Both large gradients; the gain's and the bias's go through partial sums."""
    d_base, d_lora, width = torch.empty_like(grad), torch.empty_like(grad), grad.shape[-1]
    sums = [torch.empty(0 if of is None else width) for of in (base, bias)]
    programs = math.ceil(grad.numel() // width / (STEPS * TILE["ROWS"]))
    partial = 2 * 4 * programs * sum(s.numel() for s in sums)
    per_number = 3 + 4 * (base is not None) + 2 * (bias is not None)
    reads, writes = (grad, gain, base, lora, bias), (d_base, d_lora, *sums)
    made = step("dora_compose_backward", reads, writes, per_number * grad.numel(), extra=partial)
    return writes, made


def transform(x: Tensor, h: Tensor) -> tuple[Tensor, Step]:
    """n (K + m) sums a row of n = K 2^m, and a product with 1 / sqrt(n)."""
    out, k = torch.empty_like(x), len(h)
    sums = int(math.log2(x.shape[-1] // k)) + (k if k > 1 else 0)
    return out, step("hadamard", (x, h), (out,), x.numel() * (sums + 1))


def row_norm(w0: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Step]:
    """W0 + s B A in registers, in fp32 outside the tensor cores; squares by span of columns."""
    norm, (d_out, d_in) = w0.new_empty(len(w0), dtype=torch.float32), w0.shape
    partial = 2 * 4 * d_out * math.ceil(d_in / row_norm_triton.SPAN)
    operations = 2 * d_out * d_in * len(a) + 4 * d_out * d_in
    return norm, step("row_norm", (w0, a, b), (norm,), operations, FP32, partial)


def product(call: Call, v: Tensor) -> tuple[Tensor, Step]:
    """g (x W0^T + s v B^T) + bias, its sum started by the branch; or a base and the branch."""
    (tokens, rank), d_out = v.shape, len(call.b)
    b, y = call.b.to(v.dtype), call.x.new_empty(tokens, d_out)
    deep = rank if call.base is not None else rank + call.x.shape[1]
    large = (call.base,) if call.base is not None else (call.x, call.w0)
    reads = (*large, v, b, call.weights, call.gain, call.bias)
    return y, step("product", reads, (y,), 2 * tokens * d_out * deep, _engine(v, MATRIX))


def one_pass(call: Call, grad: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], Step]:
    """Z and dB from one reading of dY: partial sums of both are written and read again."""
    (tokens, d_out), rank, tile = grad.shape, v.shape[1], lowrank_linear_triton.PASS
    across, down = math.ceil(d_out / tile["COLUMNS"]), math.ceil(tokens / tile["ROWS"])
    most = max(1, across * down // lowrank_linear_triton.PROGRAMS)
    chunks = math.ceil(down / min(lowrank_linear_triton.MOST_STEPS, most))
    b = call.b.to(grad.dtype)
    made = v.new_empty(tokens, rank, dtype=torch.float32), torch.empty(d_out, rank)
    partial = 2 * 4 * rank * (across * tokens + chunks * d_out)
    reads, operations = (grad, v, b, call.gain), 4 * tokens * d_out * rank
    return made, step("one_pass", reads, made, operations, _engine(grad, MATRIX), partial)


def _engine(operand: Tensor, narrow: str) -> str:
    """fp32 is multiplied as it is, outside the tensor cores."""
    return FP32 if operand.dtype == torch.float32 else narrow


def multi_lora(
    x: Tensor, y: Tensor | None, sets: Sets, made: Segments
) -> tuple[Tensor, Step, Step]:
    """Every row as one of the largest rank; whose it is stands in the numbers."""
    rows, d_in, d_out = x.shape[0] * x.shape[1], x.shape[-1], sets.up.shape[-1]
    hidden = x.new_empty(rows, sets.rank, dtype=torch.float32)
    out = x.new_empty(*x.shape[:-1], d_out)
    tables, share, engine = (made.order, made.tiles), 2 * rows * sets.rank, _engine(x, TF32)
    shrink = step("shrink", (x, sets.down, *tables), (hidden,), share * d_in, engine)
    expand = step("expand", (y, sets.up, hidden, *tables), (out,), share * d_out, engine)
    return out, shrink, expand


LAUNCHES: dict[tuple[ModuleType, str], Launch] = {
    (dora_compose_triton, "forward"): compose,
    (dora_compose_triton, "backward"): compose_backward,
    (hadamard_triton, "forward"): transform,
    (lowrank_linear_triton, "forward"): product,
    (lowrank_linear_triton, "backward"): one_pass,
    (multi_lora_triton, "forward"): multi_lora,
    (row_norm_triton, "forward"): row_norm,
}
