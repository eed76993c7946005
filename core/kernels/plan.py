"""In which order a low-rank linear layer multiplies, chosen by counting the products.

y = x W0^T + s (x A^T) B^T for T tokens; v = x A^T, Z = s dY B, G = dY^T x. Counted is what an order
adds to the frozen layer's own products: 2 T d_in d_out forward, as much again for dX. Formulas as
in RunLoRA (arXiv 2312.03415), derived anew. Only products of matrices count: a pass over a large
tensor costs time, too, so fewer operations are not always a faster call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import AdaptError

# bf16(W0 + s B A) drops updates below half a unit of W0's last place: a fifth of the entries where
# the update is a hundredth of the weight.
MERGES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Shape:
    """What the choice depends on."""

    tokens: int
    d_in: int
    d_out: int
    rank: int
    dtype: torch.dtype = torch.float32
    needs_grad: bool = True  # of the factors
    needs_dx: bool = True  # not for the first adapted layer over a frozen trunk
    dropout: bool = False  # or whatever else changes the input of the branch alone
    gain: bool = False
    base: bool = False  # x W0^T is already there, as in a forward hook

    def __post_init__(self) -> None:
        for name in ("tokens", "d_in", "d_out", "rank"):
            if getattr(self, name) < 0:
                raise AdaptError(f"plan: {name}={getattr(self, name)} is not a number from 0")

    @property
    def frozen(self) -> int:
        """FLOPs of x W0^T, and of dY W0 where dX is needed."""
        return 2 * self.tokens * self.d_in * self.d_out * (2 if self._with_dx else 1)

    @property
    def _with_dx(self) -> bool:
        return self.needs_grad and self.needs_dx


@dataclass(frozen=True)
class Order:
    """An order of the products, forward and backward; its name, and what tells it from others."""

    name: str
    says: str
    merged: bool = False  # x (W0 + s B A)^T
    merged_dx: bool = False  # dX = dY (W0 + s B A), not dY W0 + Z A
    by_weight: bool = False  # dA = s B^T G and dB = s G A^T, not Z^T x and s dY^T v
    keeps_v: bool = False  # else it is computed again

    def flops(self, shape: Shape) -> int:
        """Two per multiply-add, beyond `Shape.frozen`.

        >>> ORDERS["P1"].flops(Shape(tokens=12608, d_in=768, d_out=2304, rank=8))
        1859125248
        """
        t, i, o, r = shape.tokens, shape.d_in, shape.d_out, shape.rank
        total = i * o * r if self.merged else t * r * (i + o)
        if shape.needs_grad:
            total += self._backward(shape)
        return 2 * total

    def _backward(self, shape: Shape) -> int:
        t, i, o, r = shape.tokens, shape.d_in, shape.d_out, shape.rank
        if self.by_weight:
            return t * i * o + 2 * i * o * r  # dX = dY W', which is kept
        factors = t * r * o + t * r * (i + o) + (0 if self.keeps_v else t * r * i)
        if not shape.needs_dx:
            return factors
        return factors + (i * o * r if self.merged_dx else t * r * i)

    def kept(self, shape: Shape) -> int:
        """Numbers kept for the backward beyond x and the parameters."""
        if not shape.needs_grad:
            return 0
        merged = self.by_weight and shape.needs_dx
        held = shape.d_in * shape.d_out if merged else 0
        return held + (shape.tokens * shape.rank if self.keeps_v else 0)


_ORDERS = (
    Order("P1", "two products, v kept", keeps_v=True),
    Order("P2", "two products, v again"),
    Order("P3", "merged forward", merged=True),
    Order("P4", "merged forward and for dX", merged=True, merged_dx=True),
    Order("P5", "merged and kept, by dY^T x", merged=True, merged_dx=True, by_weight=True),
)
ORDERS: Mapping[str, Order] = {order.name: order for order in _ORDERS}


@dataclass(frozen=True)
class Plan:
    """An order, and the call that it was chosen for."""

    shape: Shape
    order: Order


def costs(shape: Shape) -> dict[str, int]:
    """Extra FLOPs by the name of the order, also of those that the call excludes.

    >>> costs(Shape(tokens=5, d_in=768, d_out=768, rank=8, needs_grad=False))["P1"]
    122880
    """
    return {name: order.flops(shape) for name, order in ORDERS.items()}


def excluded(shape: Shape) -> dict[str, str]:
    """The orders that this call forbids, and why.

    >>> excluded(Shape(8, 4, 4, 2, dtype=torch.bfloat16))["P3"]
    'torch.bfloat16 would round small updates away'
    """
    if shape.base:
        why = "x W0^T is already there"
    elif shape.dropout:
        why = "dropout acts on the branch alone"
    elif shape.gain:
        why = "the gain is no part of W0 + s B A"
    elif shape.dtype not in MERGES:
        why = f"{shape.dtype} would round small updates away"
    else:
        return {}
    return {name: why for name, order in ORDERS.items() if order.merged}


def choose(shape: Shape, wanted: Plan | str | None = None) -> Plan:
    """The allowed order with the fewest FLOPs, of equal ones the first; or the one that is wanted.

    Raises `AdaptError` for an order that does not exist or that the call forbids.

    >>> choose(Shape(tokens=12608, d_in=768, d_out=2304, rank=8)).order.name
    'P4'
    >>> choose(Shape(tokens=12608, d_in=768, d_out=2304, rank=8, dropout=True)).order.name
    'P1'
    """
    forbidden = excluded(shape)
    allowed = [name for name in ORDERS if name not in forbidden]
    if wanted is None:
        extra = costs(shape)
        return Plan(shape, ORDERS[min(allowed, key=extra.__getitem__)])
    name = wanted.order.name if isinstance(wanted, Plan) else wanted
    can = ", ".join(allowed)
    if name not in ORDERS:
        raise AdaptError(f"plan {name!r} is not known: {can}")
    if name in forbidden:
        raise AdaptError(f"plan {name} ({ORDERS[name].says}): {forbidden[name]}; {can} can run")
    return Plan(shape, ORDERS[name])


def explain(plan: Plan) -> str:
    """A table: what each order costs beyond the frozen layer, what it keeps, why it cannot run.

    >>> print(explain(choose(Shape(12608, 768, 2304, 8, needs_grad=False))))
    12608 tokens, 768 -> 2304, rank 8, torch.float32, forward alone: 44.619 GFLOP
      P1  two products, v kept             0.620 GFLOP more
      P2  two products, v again            0.620 GFLOP more
    > P3  merged forward                   0.028 GFLOP more
      P4  merged forward and for dX        0.028 GFLOP more
      P5  merged and kept, by dY^T x       0.028 GFLOP more
    """
    shape, forbidden = plan.shape, excluded(plan.shape)
    what = "forward alone"
    if shape.needs_grad:
        what = "with dX" if shape.needs_dx else "without dX"
    lines = [
        f"{shape.tokens} tokens, {shape.d_in} -> {shape.d_out}, rank {shape.rank}, {shape.dtype},"
        f" {what}: {shape.frozen / 1e9:.3f} GFLOP"
    ]
    for name, order in ORDERS.items():
        mark, kept = ">" if order == plan.order else " ", order.kept(shape)
        line = f"{mark} {name}  {order.says:<27} {order.flops(shape) / 1e9:>10.3f} GFLOP more"
        line += f", keeps {kept:,} numbers" if kept else ""
        lines.append(line + (f"; excluded: {forbidden[name]}" if name in forbidden else ""))
    return "\n".join(lines)
