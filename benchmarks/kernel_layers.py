"""A DoRA layer's forward and backward as three libraries run it on a GPU, to count or to time it.

The published form is written here from the paper's formulas (arXiv 2603.22276): its code has no
licence. Its fused kernels exist as counted steps alone. Biases: none, as in the models it names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from polyadapt.benchmarks.kernel_traffic import Step, Traffic, launched, numberless, step
from polyadapt.core import DoRA, attach

DTYPE = torch.bfloat16
Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Tokens at once, a weight [d_out, d_in], and the rank."""

    tokens: int
    d_out: int
    d_in: int
    rank: int

    def __str__(self) -> str:
        return f"{self.d_out} x {self.d_in}, r {self.rank}"


def frozen(size: Size) -> Call:
    """The layer alone."""
    return _layer(size)


def peft(size: Size, dtype: torch.dtype = DTYPE) -> Call:
    """PEFT 0.21.2 with factors and magnitude of this dtype; x then has it, too, as there."""
    layer = _layer(size)
    a, b = _factor(size.rank, size.d_in, dtype), _factor(size.d_out, size.rank, dtype)
    dora: Any = DoraLinearLayer(fan_in_fan_out=False)  # type: ignore[no-untyped-call]
    dora.weight = nn.Parameter(torch.ones(size.d_out, dtype=dtype))
    factors: dict[str, Any] = {"lora_A": a, "lora_B": b, "scaling": 1.0}

    def call(x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        delta: Tensor = dora(x.to(dtype), **factors, base_layer=layer, base_result=y)
        return (y + delta).to(y.dtype)

    return call


def peft_in_fp32(size: Size) -> Call:
    """What `get_peft_model` makes of a bf16 model: factors in fp32. Autocast is not on."""
    return peft(size, torch.float32)


def published(size: Size) -> Call:
    """The factored norm in fp32, plain products, and the two fused kernels."""
    layer, a, b = _layer(size), _factor(size.rank, size.d_in), _factor(size.d_out, size.rank)
    magnitude = nn.Parameter(torch.empty(size.d_out))

    def call(x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        with torch.no_grad():
            norm = published_norm(layer.weight, a.weight, b.weight)
        gain = (magnitude / norm.to(DTYPE)).to(DTYPE)
        delta: Tensor = PublishedCompose.apply(y, b(a(x)), gain)
        return y + delta

    return call


def published_norm(w0: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """sqrt(||w||^2 + 2 s <b, w A^T> + s^2 b A A^T b^T) of each row, in fp32."""
    w0, a, b = w0.float(), a.float(), b.float()  # in reality by chunks: the same bytes
    base = torch.linalg.vector_norm(w0, dim=1).square()  # one pass: the best that it could be
    cross = (b * (w0 @ a.t())).sum(1)
    gram = ((b @ (a @ a.t())) * b).sum(1)
    squared: Tensor = base + 2 * scale * cross + scale**2 * gram
    return squared.clamp_min(0).sqrt()


class PublishedCompose(torch.autograd.Function):
    """Delta and s l + y0 in one kernel; both gradients in another; the gain's in plain sums."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, lora: Tensor, gain: Tensor) -> Tensor:
        delta, inner = launched(_compose)(base, lora, gain)
        ctx.save_for_backward(inner, gain)
        return delta  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad,) = grads
        inner, gain = ctx.saved_tensors
        d_base, d_lora = launched(_compose_backward)(grad, gain)
        return d_base, d_lora, (inner * grad).sum(0)


def _compose(base: Tensor, lora: Tensor, gain: Tensor) -> tuple[tuple[Tensor, Tensor], Step]:
    made = torch.empty_like(base), torch.empty_like(base)
    return made, step("published compose", (base, lora, gain), made, 5 * base.numel())


def _compose_backward(grad: Tensor, gain: Tensor) -> tuple[tuple[Tensor, Tensor], Step]:
    made = torch.empty_like(grad), torch.empty_like(grad)
    return made, step("published compose backward", (grad, gain), made, 3 * grad.numel())


def ours(size: Size) -> Call:
    """`DoRA` of this library, attached; factors and magnitude in fp32."""
    model = nn.Sequential(_layer(size))
    with torch.device("cpu"):  # where factors start, wherever the layer is
        attach(model, DoRA(rank=size.rank), at="0")
    return model


def least(size: Size) -> tuple[int, int]:
    """Bytes and operations of a forward that no sequence can go below.

    x, W0, A, B in bf16 and m read once, y' written once; the products of the layer and of the
    branch, and B A once for the norm.
    """
    t, o, i, r = size.tokens, size.d_out, size.d_in, size.rank
    numbers = t * i + o * i + r * (i + o) + o + t * o
    return numbers * DTYPE.itemsize, 2 * t * o * i + 2 * t * r * (i + o) + 2 * o * i * r + 4 * o * i


def counted(kind: Callable[[Size], Call], size: Size) -> tuple[list[Step], list[Step]]:
    """The steps of a forward and of the backward that follows."""
    with numberless():
        call = kind(size)
        x = torch.empty(size.tokens, size.d_in, dtype=DTYPE, requires_grad=True)
        with Traffic() as forward:
            y = call(x)
        with Traffic() as backward:
            y.backward(torch.empty_like(y))
    return forward.steps, backward.steps


def _layer(size: Size) -> nn.Linear:
    return _factor(size.d_out, size.d_in).requires_grad_(False)


def _factor(rows: int, columns: int, dtype: torch.dtype = DTYPE) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False, dtype=dtype)
