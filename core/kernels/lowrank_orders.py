"""The orders of `plan`, run: a low-rank linear layer forward and backward on rows of tokens.

Two of the products touch tensors of the output's size and have kernels: `product` and `both`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import runs_kernel
from .plan import Order

# By the bytes that are moved: partial sums of Z are written and read again, in fp32, once per 256
# columns of dY. That is half of dY in 16 bits at this rank, and as much as dY at the next power.
LARGEST_ONE_PASS = 32
# Kernels multiply fp32 exactly, without matrix units; beyond this rank a library's product wins.
LARGEST_EXACT = 64
SHORT = (torch.float16, torch.bfloat16)
WIDE_LOADS = 16  # rows of other lengths are loaded number by number


@dataclass(frozen=True, eq=False)
class Call:
    """The operands: x [T, d_in], base [T, d_out], the others as `lowrank_linear` has them."""

    x: Tensor
    w0: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None = None
    base: Tensor | None = None
    weights: Tensor | None = None
    keep: Tensor | None = None
    keep_scale: float = 1.0
    gain: Tensor | None = None

    @property
    def wide(self) -> torch.dtype:
        """What sums, rank weights and the gain are held in."""
        return torch.promote_types(self.x.dtype, torch.float32)

    @property
    def weight(self) -> Tensor:
        """W0, where there is no base in its place."""
        assert self.w0 is not None, "checked by the caller"
        return self.w0

    def entering(self) -> Tensor:
        """What the branch sees of x."""
        return self.x if self.keep is None else self.dropped(self.x)

    def dropped(self, t: Tensor) -> Tensor:
        """keep * keep_scale * t."""
        return t if self.keep is None else torch.where(self.keep, t * self.keep_scale, 0)

    def down(self) -> Tensor:
        """v [T, r], without the rank weights."""
        return F.linear(self.entering(), self.a.to(self.x.dtype))

    def weighted(self, t: Tensor) -> Tensor:
        """The last axis times the rank weights, in fp32."""
        return t if self.weights is None else t.to(self.wide) * self.weights

    def merged(self) -> Tensor:
        """W0 + s B diag(p) A; fp32 and fp64 alone come here."""
        b = self.weighted(self.b.to(self.wide))
        return torch.addmm(self.weight, b, self.a.to(self.wide), alpha=self.scale)

    def moved(self, grad: Tensor) -> Tensor:
        """dY behind the gain."""
        return grad if self.gain is None else (grad * self.gain).to(grad.dtype)


def run(call: Call, order: Order) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [T, d_out], and v or the merged weight, whichever there was."""
    if order.merged:
        merged = call.merged()
        return F.linear(call.x, merged, call.bias), None, merged
    v = call.down()
    return product(call, v), v, None


def product(call: Call, v: Tensor) -> Tensor:
    """y from v, in one kernel where it runs.

    A kernel's whole product takes 16 bits and rows of whole loads; else W0's product is a library's
    and the kernel adds the branch to it.
    """
    short, rank = call.x.dtype in SHORT, v.shape[1]
    suits = rank > 0 and (short or rank <= LARGEST_EXACT) and len(call.b) > 0
    if not (suits and runs_kernel(v)):
        return reference(call, v)
    from . import lowrank_linear_triton

    aligned = call.x.shape[1] % WIDE_LOADS == 0 and len(call.b) % WIDE_LOADS == 0
    if call.base is None and not (short and aligned):
        call = replace(call, base=F.linear(call.x, call.weight, call.bias), w0=None)
    launched: Tensor = lowrank_linear_triton.forward(call, v)
    return launched


def reference(call: Call, v: Tensor) -> Tensor:
    """g (x W0^T + s (v p) B^T) + bias, rounded once; a base holds x W0^T + bias already."""
    x, wide, gain = call.x, call.wide, call.gain
    bias = None if call.bias is None else call.bias.to(wide)
    v, up = call.weighted(v).to(x.dtype).to(wide), call.b.to(x.dtype).to(wide)
    if call.base is None:
        y = F.linear(x.to(wide), call.weight.to(wide), None if gain is not None else bias)
        y.addmm_(v, up.t(), alpha=call.scale)
    else:
        y = call.base.to(wide)
        y = y if gain is None or bias is None else y - bias
        y = torch.addmm(y, v, up.t(), alpha=call.scale)
    if gain is not None:
        y *= gain
        y = y if bias is None else y.add_(bias)
    return y.to(x.dtype)


def both(call: Call, grad: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Z = s (g dY) B [T, r] and s (g dY)^T v [d_out, r] in fp32: one pass over dY in a kernel."""
    rank, aligned = v.shape[1], grad.shape[1] % WIDE_LOADS == 0
    # Ranks between would spill: v and B are then loaded number by number.
    suits = aligned and (0 < rank <= 16 or rank == LARGEST_ONE_PASS)
    if suits and grad.dtype in SHORT and runs_kernel(grad):
        from . import lowrank_linear_triton

        launched: tuple[Tensor, Tensor] = lowrank_linear_triton.backward(call, grad, v)
        return launched
    return up_again(call, grad), by_column(call, grad, v)


def up_again(call: Call, grad: Tensor) -> Tensor:
    """Z = s (g dY) B."""
    return (call.moved(grad) @ call.b.to(grad.dtype)).to(call.wide) * call.scale


def by_column(call: Call, grad: Tensor, v: Tensor) -> Tensor:
    """s (g dY)^T v: dB but for the rank weights."""
    return (call.moved(grad).t() @ v).to(call.wide) * call.scale


def run_backward(
    call: Call, order: Order, grad: Tensor, kept: Tensor | None, needs: Mapping[str, bool]
) -> dict[str, Tensor]:
    """Operand -> its gradient, for those of x, a, b, weights and gain that need one."""
    if order.by_weight:
        return _by_weight(call, grad, kept, needs)
    v = None
    if needs["b"] or needs["weights"] or needs["gain"]:
        v = kept if kept is not None else call.down()
    found = _of_factors(call, order, grad, v, needs)
    if needs["gain"] and v is not None:
        found["gain"] = _of_gain(call, grad, v)
    return found


def _by_weight(
    call: Call, grad: Tensor, kept: Tensor | None, needs: Mapping[str, bool]
) -> dict[str, Tensor]:
    """From G = dY^T x; `kept` is the merged weight."""
    found: dict[str, Tensor] = {}
    a, b = call.a.to(call.wide), call.b.to(call.wide)
    if needs["a"] or needs["b"] or needs["weights"]:
        g = grad.t() @ call.x
        inner = call.scale * (b.t() @ g)
        found["weights"] = (inner * a).sum(1)
        found["a"] = call.weighted(inner.t()).t()
        found["b"] = call.weighted(call.scale * (g @ a.t()))
    if needs["x"]:
        found["x"] = grad @ (call.merged() if kept is None else kept)
    return found


def _of_factors(
    call: Call, order: Order, grad: Tensor, v: Tensor | None, needs: Mapping[str, bool]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    through = needs["a"] or needs["weights"] or (needs["x"] and not order.merged_dx)
    if needs["b"] and v is not None:
        z, d_b = both(call, grad, v) if through else (None, by_column(call, grad, v))
        found["b"] = call.weighted(d_b)
    else:
        z = up_again(call, grad) if through else None
    if z is None:
        return found | ({"x": grad @ call.merged()} if needs["x"] else {})
    if needs["weights"] and v is not None:
        found["weights"] = (z * v).sum(0)
    z = call.weighted(z).to(grad.dtype)
    if needs["a"]:
        found["a"] = z.t() @ call.entering()
    if needs["x"]:
        found["x"] = _of_x(call, order, grad, z)
    return found


def _of_x(call: Call, order: Order, grad: Tensor, z: Tensor) -> Tensor:
    """dY W0 + keep (Z A), or dY W'; without W0 there was a base, with a gradient of its own."""
    if order.merged_dx:
        return grad @ call.merged()
    a = call.a.to(z.dtype)
    if call.w0 is None:
        return call.dropped(z @ a)
    d_x = call.moved(grad) @ call.weight
    return d_x.addmm_(z, a) if call.keep is None else d_x.add_(call.dropped(z @ a))


def _of_gain(call: Call, grad: Tensor, v: Tensor) -> Tensor:
    """The sum over tokens of dY (x W0^T + s v B^T): a second product spares keeping y."""
    bias = call.bias if call.base is not None else None
    y = product(replace(call, gain=None, bias=None), v).to(call.wide)
    y = y if bias is None else y - bias
    return (grad * y).sum(0)
