"""DoRA's output from the base product and the low-rank one, in one pass (arXiv 2603.22276).

The published kernel gets g in the activations' dtype, so bf16 rounds a g within 2^-9 of 1 to
exactly 1 and (g - 1) y0 is lost. Here g is fp32 up to the single rounding of the result.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import AdaptError
from .dispatch import floating, runs_kernel, shaped

OP = "dora_compose"
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def dora_compose(
    base: Tensor,
    lora: Tensor,
    gain: Tensor,
    scale: float,
    bias: Tensor | None = None,
    whole: bool = False,
) -> Tensor:
    """(g - 1) y0 + g s l with y0 = base - bias; with `whole`, base + that.

    base and lora [..., d_out] of one dtype, the result's; gain [d_out] in fp32 (fp64 beside an
    fp64 base); bias [d_out]. Gradients reach all four tensors, that of the gain sums in a fixed
    order. Raises `AdaptError` for other shapes, dtypes and devices.

    >>> base, gain = torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([1 + 2**-10, 1.0])
    >>> dora_compose(base, torch.zeros_like(base), gain, 1.0).tolist()
    [[0.0009765625, 0.0]]
    """
    _check(base, lora, gain, scale, bias)
    result: Tensor = _compose(base, lora, gain, float(scale), bias, whole)
    return result


def _check(base: Tensor, lora: Tensor, gain: Tensor, scale: float, bias: Tensor | None) -> None:
    given = {"base": base, "lora": lora, "gain": gain}
    floating(OP, **given, **({} if bias is None else {"bias": bias}))
    if base.dim() == 0:
        raise AdaptError(f"{OP}: base is a single number, not [..., d_out]")
    shaped(OP, "lora", lora, base.shape)
    shaped(OP, "gain", gain, base.shape[-1:])
    if bias is not None:
        shaped(OP, "bias", bias, base.shape[-1:])
    if lora.dtype != base.dtype:
        raise AdaptError(f"{OP}: lora is {lora.dtype} and base {base.dtype}: one is needed")
    wide = torch.promote_types(base.dtype, torch.float32)
    if gain.dtype != wide:
        raise AdaptError(f"{OP}: gain is {gain.dtype}, not {wide}: less would lose gain - 1")
    if not math.isfinite(scale):
        raise AdaptError(f"{OP}: scale {scale} is not a finite number")


def reference(
    base: Tensor, lora: Tensor, gain: Tensor, scale: float, bias: Tensor | None, whole: bool
) -> Tensor:
    """The forward in PyTorch, in the gain's dtype up to one rounding."""
    y = base.to(gain.dtype)
    y0 = y if bias is None else y - bias.to(gain.dtype)
    delta = (gain - 1) * y0 + gain * (scale * lora.to(gain.dtype))
    return (y + delta if whole else delta).to(base.dtype)


def reference_backward(
    grad: Tensor,
    gain: Tensor,
    scale: float,
    whole: bool,
    base: Tensor | None,
    lora: Tensor | None,
    bias: Tensor | None,
) -> Gradients:
    """d base, d lora, d gain (empty without base and lora), sums of d by column (without bias)."""
    d = grad.to(gain.dtype)
    d_base = ((gain if whole else gain - 1) * d).to(grad.dtype)
    d_lora = (gain * (scale * d)).to(grad.dtype)
    d_gain, columns = gain.new_empty(0), gain.new_empty(0)  # an op's results share no memory
    if base is not None and lora is not None:
        inner = scale * lora.to(gain.dtype) + base.to(gain.dtype)
        inner = inner if bias is None else inner - bias.to(gain.dtype)
        d_gain = _by_column(inner * d)
    if bias is not None:
        columns = _by_column(d)
    return d_base, d_lora, d_gain, columns


def _by_column(t: Tensor) -> Tensor:
    width = t.shape[-1]
    return t.reshape(t.numel() // max(1, width), width).sum(0)


@torch.library.custom_op(f"polyadapt::{OP}", mutates_args=())
def _compose(
    base: Tensor, lora: Tensor, gain: Tensor, scale: float, bias: Tensor | None, whole: bool
) -> Tensor:
    base, lora, gain = base.contiguous(), lora.contiguous(), gain.contiguous()
    if runs_kernel(base):
        from . import dora_compose_triton

        launched: Tensor = dora_compose_triton.forward(base, lora, gain, scale, bias, whole)
        return launched
    return reference(base, lora, gain, scale, bias, whole)


@_compose.register_fake
def _(base: Tensor, lora: Tensor, gain: Tensor, scale: float, bias: Any, whole: bool) -> Tensor:
    return base.new_empty(base.shape)


@torch.library.custom_op(f"polyadapt::{OP}_backward", mutates_args=())
def _backward(
    grad: Tensor,
    gain: Tensor,
    scale: float,
    whole: bool,
    base: Tensor | None,
    lora: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, gain = grad.contiguous(), gain.contiguous()
    base = None if base is None else base.contiguous()
    lora = None if lora is None else lora.contiguous()
    if runs_kernel(grad):
        from . import dora_compose_triton

        run = dora_compose_triton.backward(grad, gain, scale, whole, base, lora, bias)
        launched: Gradients = run
        return launched
    return reference_backward(grad, gain, scale, whole, base, lora, bias)


@_backward.register_fake
def _(
    grad: Tensor, gain: Tensor, scale: float, whole: bool, base: Any, lora: Any, bias: Any
) -> Gradients:
    like, width = grad.new_empty(grad.shape), gain.shape[0]
    d_gain = gain.new_empty(0 if base is None else width)
    return like, torch.empty_like(like), d_gain, gain.new_empty(0 if bias is None else width)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base, lora, gain, ctx.scale, bias, ctx.whole = inputs
    for_gain = ctx.needs_input_grad[2]  # the two large tensors are kept for the gain alone
    ctx.save_for_backward(gain, *((base, lora) if for_gain else (None, None)), bias)


def _grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gain, base, lora, bias = ctx.saved_tensors
    ran = _backward(grad, gain, ctx.scale, ctx.whole, base, lora, bias)
    d_base, d_lora, d_gain, columns = ran
    d_bias = None if bias is None else ((1 - gain) * columns).to(bias.dtype)
    return d_base, d_lora, None if base is None else d_gain, None, d_bias, None


_compose.register_autograd(_grads, setup_context=_keep)
