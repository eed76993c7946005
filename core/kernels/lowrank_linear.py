"""A frozen linear layer with a low-rank branch as one operation that chooses its products' order.

The graph is cut at the rank, as in LoRAFusion (arXiv 2510.00206): v = x A^T alone, then one product
whose sum starts from the branch. `plan` chooses, `lowrank_orders` runs what it chose.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import AdaptError
from ..precision import without_autocast
from .dispatch import floating, shaped
from .lowrank_orders import Call, run, run_backward
from .plan import ORDERS, Plan, Shape, choose

OP = "lowrank_linear"
OPERANDS = (
    "Tensor x, Tensor? w0, Tensor a, Tensor b, float scale, Tensor? bias, Tensor? base,"
    " Tensor? weights, Tensor? keep, float keep_scale, Tensor? gain"
)
LEARN = {"x": 0, "a": 2, "b": 3, "weights": 7, "gain": 10}  # whose gradients the backward op has


def lowrank_linear(
    x: Tensor,
    w0: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    base: Tensor | None = None,
    weights: Tensor | None = None,
    keep: Tensor | None = None,
    keep_scale: float = 1.0,
    gain: Tensor | None = None,
    plan: Plan | str | None = None,
) -> Tensor:
    """y = g (x W0^T + s ((keep_scale keep x) A^T p) B^T) + bias, with g and p 1 unless given.

    x [..., d_in], W0 [d_out, d_in] frozen, A [r, d_in], B [d_out, r], bias [d_out]; `weights` p [r]
    and `gain` g [d_out] in fp32 (fp64 beside an fp64 x); `keep` bool of x's shape: dropout. A
    `base` [..., d_out] is x W0^T + bias, computed already: W0 is then not read and may be None.
    The factors may have another dtype than x, which they are rounded to; theirs is the gradients'.
    `plan` is the name of an order or a plan (see `plan`), else the cheapest that may run. Gradients
    reach all tensors but W0 and `keep`; second ones do not exist. Equal inputs give equal bits.
    Raises `AdaptError` for other shapes, dtypes and devices and for an order that is forbidden.

    >>> x, w0 = torch.tensor([[1.0, 2.0]]), torch.eye(2)
    >>> lowrank_linear(x, w0, torch.ones(1, 2), torch.tensor([[1.0], [0.0]]), scale=0.5)
    tensor([[2.5000, 2.0000]])
    """
    same = {n: t for n, t in {"w0": w0, "bias": bias, "base": base}.items() if t is not None}
    fp32 = {n: t for n, t in {"weights": weights, "gain": gain}.items() if t is not None}
    floating(OP, x=x, a=a, b=b, **same, **fp32)
    _check_shapes(x, a, b, same, fp32, keep)
    _check_dtypes(x, same, fp32)
    _check_numbers(scale=scale, keep_scale=keep_scale)
    grad = torch.is_grad_enabled()
    by_v = grad and any(t is not None and t.requires_grad for t in (b, weights, gain))
    needs_dx = grad and x.requires_grad
    shape = Shape(
        tokens=math.prod(x.shape[:-1]),
        d_in=x.shape[-1],
        d_out=b.shape[0],
        rank=len(a),
        dtype=x.dtype,
        needs_grad=by_v or needs_dx or (grad and a.requires_grad),
        needs_dx=needs_dx,
        dropout=keep is not None,
        gain=gain is not None,
        base=base is not None,
    )
    order = choose(shape, plan).order
    kept = (order.keeps_v and by_v) or (order.by_weight and needs_dx)
    w0 = w0 if base is None else None
    operands = (x, w0, a, b, float(scale), bias, base, weights, keep, float(keep_scale), gain)
    y: Tensor = _forward(*operands, order.name, kept)[0]
    return y


def _check_shapes(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    same: dict[str, Tensor],
    fp32: dict[str, Tensor],
    keep: Tensor | None,
) -> None:
    if x.dim() == 0:
        raise AdaptError(f"{OP}: x is a single number, not [..., d_in]")
    for name, factor in (("a", a), ("b", b)):
        if factor.dim() != 2:
            raise AdaptError(f"{OP}: {name} is {list(factor.shape)}, not a matrix")
    (rank, d_in), d_out = a.shape, b.shape[0]
    shaped(OP, "x", x, (*x.shape[:-1], d_in))
    shaped(OP, "b", b, (d_out, rank))
    wanted = {"w0": (d_out, d_in), "bias": (d_out,), "base": (*x.shape[:-1], d_out)}
    wanted |= {"weights": (rank,), "gain": (d_out,)}
    for name, tensor in (same | fp32).items():
        shaped(OP, name, tensor, wanted[name])
    if not {"w0", "base"} & {*same}:
        raise AdaptError(f"{OP}: w0 is None, and there is no base in its place")
    if keep is None:
        return
    shaped(OP, "keep", keep, x.shape)
    if keep.dtype != torch.bool:
        raise AdaptError(f"{OP}: keep is {keep.dtype}, not torch.bool")
    if keep.device != x.device:
        raise AdaptError(f"{OP}: keep is on {keep.device} and x on {x.device}: one is needed")


def _check_dtypes(x: Tensor, same: dict[str, Tensor], fp32: dict[str, Tensor]) -> None:
    for name, tensor in same.items():
        if tensor.dtype != x.dtype:
            raise AdaptError(f"{OP}: {name} is {tensor.dtype} and x {x.dtype}: one is needed")
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, tensor in fp32.items():
        if tensor.dtype != wide:
            raise AdaptError(f"{OP}: {name} is {tensor.dtype}, not {wide}")


def _check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise AdaptError(f"{OP}: {name} {number} is not a finite number")


def _rows(x: Tensor, w0: Any, a: Tensor, b: Tensor, *operands: Any) -> Call:
    """The call with x, base and keep as rows of tokens, all but W0 and the base contiguous."""
    scale, bias, base, weights, keep, keep_scale, gain = operands
    tokens = math.prod(x.shape[:-1])

    def dense(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.contiguous()

    rows = x.reshape(tokens, x.shape[-1]).contiguous()
    base = None if base is None else base.reshape(tokens, len(b))
    keep = None if keep is None else keep.reshape(rows.shape).contiguous()
    vectors = (dense(bias), base, dense(weights), keep, keep_scale, dense(gain))
    return Call(rows, w0, a.contiguous(), b.contiguous(), scale, *vectors)


@torch.library.custom_op(
    f"polyadapt::{OP}",
    mutates_args=(),
    schema=f"({OPERANDS}, str order, bool keeps) -> (Tensor, Tensor)",
)
def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """y, and what the order keeps for its backward."""
    *operands, name, keeps = rest
    call, order = _rows(x, *operands), ORDERS[name]
    # Autocast would multiply in other dtypes than the checked ones.
    with without_autocast(x):
        y, v, merged = run(call, order)
    kept = v if order.keeps_v else merged
    y = y.view(*x.shape[:-1], len(call.b))
    return y, kept if keeps and kept is not None else x.new_empty(0)


@_forward.register_fake
def _(x: Tensor, w0: Any, a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, name, keeps = rest
    y, order = x.new_empty(*x.shape[:-1], b.shape[0]), ORDERS[name]
    v = (math.prod(x.shape[:-1]), a.shape[0])
    shape = v if order.keeps_v else (b.shape[0], x.shape[-1])
    return y, x.new_empty(shape if keeps else 0)


@torch.library.custom_op(
    f"polyadapt::{OP}_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {OPERANDS}, Tensor? kept, str order, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The gradients of `LEARN`, empty where none is needed. Without W0 there was a base."""
    *operands, kept, name, needs = rest
    call, wanted = _rows(x, *operands), dict(zip(LEARN, needs, strict=True))
    rows = grad.reshape(len(call.x), len(call.b)).contiguous()
    with without_autocast(x):
        found = run_backward(call, ORDERS[name], rows, kept, wanted)
    like = zip(LEARN, _learning(x, *operands), strict=True)
    return tuple(
        found[n].to(t.dtype).reshape(t.shape).contiguous()
        if wanted[n] and t is not None
        else x.new_empty(0)
        for n, t in like
    )


@_backward.register_fake
def _(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *operands, _, _, needs = rest
    return tuple(
        x.new_empty(0) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip(_learning(x, *operands), needs, strict=True)
    )


def _learning(*operands: Any) -> list[Tensor | None]:
    return [operands[n] for n in LEARN.values()]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w0, a, b, ctx.scale, bias, base, weights, keep, ctx.keep_scale, gain, ctx.order, keeps = (
        inputs
    )
    ctx.based = base is not None
    base = base if ctx.needs_input_grad[LEARN["gain"]] else None  # kept for the gain alone
    kept = output[1] if keeps else None
    ctx.save_for_backward(x, w0, a, b, bias, base, weights, keep, gain, kept)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad is None:
        return tuple(found)
    x, w0, a, b, bias, base, weights, keep, gain, kept = ctx.saved_tensors
    operands = (x, w0, a, b, ctx.scale, bias, base, weights, keep, ctx.keep_scale, gain)
    needs = [ctx.needs_input_grad[n] for n in LEARN.values()]
    if any(needs):
        ran = _backward(grad, *operands, kept, ctx.order, needs)
        for n, need, one in zip(LEARN.values(), needs, ran, strict=True):
            found[n] = one if need else None
    if ctx.needs_input_grad[6]:  # base
        found[6] = grad if gain is None else (grad * gain).to(grad.dtype)
    if ctx.needs_input_grad[5] and not (ctx.based and gain is None):  # bias, if it was read
        columns = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1]).sum(
            0, dtype=torch.promote_types(grad.dtype, torch.float32)
        )
        found[5] = (columns * (1 - gain) if ctx.based else columns).to(grad.dtype)
    return tuple(found)


_forward.register_autograd(_grads, setup_context=_keep)
