"""Many low-rank sets in one batch: y_t + s B A x_t with the factors of the set that row t names.

S-LoRA (arXiv 2311.03285) and Punica (arXiv 2310.18547) serve adapters so: no factor is copied for a
row, ranks may differ, and the scale stays out of the stored factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import AdaptError
from ..precision import without_autocast
from .dispatch import floating, runs_kernel, shaped
from .segments import Segments, segments

OP = "multi_lora"
# What a set costs a loop beside its rows, in numbers moved: the start of its operations on a CPU.
START = 2**14


@dataclass(frozen=True, eq=False)
class Sets:
    """The factors of n sets, one after another, each with its own rank and scale."""

    down: Tensor  # [sum of ranks, d_in]
    up: Tensor  # [sum of ranks, d_out]: the columns of each B
    starts: Tensor  # int64 [n + 1]: each set's first row; the last set is none, of rank 0
    ranks: Tensor  # int64 [n + 1]
    scales: Tensor  # [n + 1], fp32 (fp64 beside fp64 factors)
    rank: int  # the largest

    def __len__(self) -> int:
        return len(self.ranks) - 1

    @staticmethod
    def of(downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float]) -> Sets:
        """A_k [r_k, d_in], B_k [d_out, r_k] and s_k of each set; a rank of 0 leaves rows alone.

        Raises `AdaptError` for no set, and for shapes, dtypes and devices that do not go together.
        """
        _check_factors(downs, ups, scales)
        ranks = [len(a) for a in downs] + [0]
        first, wide = downs[0], torch.promote_types(downs[0].dtype, torch.float32)
        numbers = torch.tensor([ranks, [sum(ranks[:k]) for k in range(len(ranks))]])
        scale = torch.tensor([*map(float, scales), 0.0], dtype=torch.float64).to(wide)
        on = numbers.to(first.device)
        down, up = torch.cat(list(downs)), torch.cat([b.mT for b in ups])
        return Sets(down, up, on[1], on[0], scale.to(first.device), max(ranks))


def _check_factors(downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float]) -> None:
    if not downs or not len(downs) == len(ups) == len(scales):
        counts = f"{len(downs)} downs, {len(ups)} ups and {len(scales)} scales"
        raise AdaptError(f"{OP}: {counts}: one of each per set, and one set or more")
    factors = {f"downs[{k}]": a for k, a in enumerate(downs)}
    factors |= {f"ups[{k}]": b for k, b in enumerate(ups)}
    floating(OP, **factors)
    for name, factor in factors.items():
        if factor.dim() != 2 or factor.dtype != downs[0].dtype:
            raise AdaptError(
                f"{OP}: {name} is {factor.dtype} {list(factor.shape)}, not a matrix of"
                f" {downs[0].dtype} as downs[0]"
            )
    for k, (a, b, scale) in enumerate(zip(downs, ups, scales, strict=True)):
        shaped(OP, f"downs[{k}]", a, (a.shape[0], downs[0].shape[1]))
        shaped(OP, f"ups[{k}]", b, (ups[0].shape[0], a.shape[0]))
        if not math.isfinite(scale):
            raise AdaptError(f"{OP}: scales[{k}] is {scale}, not a finite number")


def multi_lora(
    x: Tensor, y: Tensor, sets: Sets, ids: Tensor, made: Segments | None = None
) -> Tensor:
    """y + s_k B_k A_k x, k the set that a row's id names; the bits of y where that is -1.

    x [..., d_in], y [..., d_out] of one dtype; ids int64 with the first axes of x: one per sample
    [n] or per token [n, t]. Products and sums are fp32 (fp64 in fp64) up to the one rounding of the
    result, and equal inputs have equal bits. Gradients reach x and y; sets are frozen.

    `made`: `segments(ids.flatten(), len(sets), rows per id)`, for several calls with the same ids,
    which then are not checked again (on a GPU a check waits for it).

    Raises `AdaptError` for shapes, dtypes and devices that do not fit, for ids that name no set and
    for factors that require grad.

    >>> downs, ups = [torch.ones(1, 2), torch.ones(2, 2)], [torch.ones(1, 1), torch.ones(1, 2)]
    >>> sets = Sets.of(downs, ups, scales=[1.0, 10.0])
    >>> y = multi_lora(torch.ones(3, 2), torch.zeros(3, 1), sets, torch.tensor([1, -1, 0]))
    >>> y.flatten().tolist()
    [40.0, 0.0, 2.0]
    """
    _check(x, y, sets, ids, checked=made is not None)
    rows = (ids.numel(), math.prod(x.shape[ids.dim() : -1]))
    flat, base = x.reshape(*rows, x.shape[-1]), y.reshape(*rows, y.shape[-1])
    result: Tensor = _multi_lora(flat, base, *_of(sets), sets.rank, ids.flatten(), *_tables(made))
    return result.view(y.shape)


def _of(sets: Sets) -> tuple[Tensor, ...]:
    return sets.down, sets.up, sets.starts, sets.ranks, sets.scales


def _tables(made: Segments | None) -> tuple[Tensor | None, Tensor | None, int]:
    return (None, None, 0) if made is None else (made.order, made.tiles, made.rows)


def _check(x: Tensor, y: Tensor, sets: Sets, ids: Tensor, checked: bool) -> None:
    floating(OP, x=x, y=y, **{"the sets' factors": sets.down})
    if x.dtype != y.dtype:
        raise AdaptError(f"{OP}: y is {y.dtype} and x {x.dtype}: one is needed")
    if torch.is_grad_enabled() and (sets.down.requires_grad or sets.up.requires_grad):
        raise AdaptError(
            f"{OP}: the sets' factors require grad, and gradients reach x and y alone:"
            " activate(per_sample=...) trains the sets of a mixed batch"
        )
    if ids.dtype != torch.int64 or ids.device != x.device or not 0 < ids.dim() < x.dim():
        raise AdaptError(
            f"{OP}: ids are {ids.dtype} {list(ids.shape)} on {ids.device}, not int64 on"
            f" {x.device} with the first axes of x {list(x.shape)}"
        )
    shaped(OP, "ids", ids, x.shape[: ids.dim()])
    shaped(OP, "x", x, (*x.shape[:-1], sets.down.shape[1]))
    shaped(OP, "y", y, (*x.shape[:-1], sets.up.shape[1]))
    if ids.numel() and not checked and not torch.compiler.is_compiling():
        low, high = int(ids.min()), int(ids.max())
        if not -1 <= low <= high < len(sets):
            raise AdaptError(
                f"{OP}: ids go from {low} to {high}; there are sets 0 to {len(sets) - 1}, and -1"
            )


def reference(x: Tensor, y: Tensor, sets: Sets, ids: Tensor) -> Tensor:
    """x [m, t, d_in], y [m, t, d_out], ids [m] in PyTorch, the cheaper way."""
    owner = torch.where((ids >= 0) & (ids < len(sets)), ids, len(sets))
    way = gathered if gathers(x, y, sets.rank, len(owner.unique())) else looped
    with without_autocast(x):
        return way(x, y, sets, owner)


def gathers(x: Tensor, y: Tensor, rank: int, present: int) -> bool:
    """Whether a copy of the factors for each id moves fewer numbers than a loop over the sets.

    A loop takes the rows of each set out of x and y and puts them back, and starts anew for each.
    """
    ids, tokens, d_in = x.shape
    copied = ids * rank * (d_in + y.shape[-1])
    return copied <= ids * tokens * (d_in + 2 * y.shape[-1]) + present * START


def gathered(x: Tensor, y: Tensor, sets: Sets, owner: Tensor) -> Tensor:
    """Two batched products over factors that were copied for each id."""
    wide, own = torch.promote_types(x.dtype, sets.scales.dtype), sets.ranks[owner]
    place = torch.arange(sets.rank, device=x.device)
    outside = place >= own[:, None]
    place = (sets.starts[owner][:, None] + place).masked_fill(outside, 0)
    a, b = (f[place].to(wide) for f in (sets.down, sets.up))
    if outside[own > 0].any():
        # What a rank leaves empty is another set's: not even times 0, it may be infinite.
        a, b = (f.masked_fill(outside[..., None], 0) for f in (a, b))
    delta = torch.bmm(torch.bmm(x.to(wide), a.mT), b)
    changed = y.to(wide) + sets.scales[owner][:, None, None] * delta
    return torch.where((own > 0)[:, None, None], changed.to(y.dtype), y)


def looped(x: Tensor, y: Tensor, sets: Sets, owner: Tensor) -> Tensor:
    """Each set over its own rows."""
    wide, out = torch.promote_types(x.dtype, sets.scales.dtype), y.clone()
    for k in owner.unique().tolist():
        first, own = int(sets.starts[k]), int(sets.ranks[k])
        if own:
            rows = (owner == k).nonzero().flatten()
            a, b = (f[first : first + own].to(wide) for f in (sets.down, sets.up))
            delta = sets.scales[k] * (x[rows].to(wide) @ a.mT @ b)
            out[rows] = (y[rows].to(wide) + delta).to(y.dtype)
    return out


@torch.library.custom_op(f"polyadapt::{OP}", mutates_args=())
def _multi_lora(
    x: Tensor,
    y: Tensor | None,
    down: Tensor,
    up: Tensor,
    starts: Tensor,
    ranks: Tensor,
    scales: Tensor,
    rank: int,
    ids: Tensor,
    order: Tensor | None,
    tiles: Tensor | None,
    rows: int,
) -> Tensor:
    sets = Sets(down.contiguous(), up.contiguous(), starts, ranks, scales, rank)
    if runs_kernel(x) and runs_kernel(up) and runs_kernel(down):
        from . import multi_lora_triton

        if order is not None and tiles is not None:
            made = Segments(order, tiles, rows)
        else:
            made = segments(ids, len(sets), x.shape[1])
        y = None if y is None else y.contiguous()
        launched: Tensor = multi_lora_triton.forward(x.contiguous(), y, sets, made)
        return launched
    y = x.new_zeros(*x.shape[:2], up.shape[1]) if y is None else y
    return reference(x, y, sets, ids).contiguous()


@_multi_lora.register_fake
def _(x: Tensor, y: Any, down: Tensor, up: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:2], up.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, *tensors, ctx.rank, ids, order, tiles, ctx.rows = inputs
    ctx.save_for_backward(*tensors, ids, order, tiles)


def _grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dy is what arrives; dx = s A^T B^T of it: the same op without y, its factors changed over."""
    down, up, starts, ranks, scales, ids, *tables = ctx.saved_tensors
    d_x = None
    if ctx.needs_input_grad[0]:
        d_x = _multi_lora(
            grad, None, up, down, starts, ranks, scales, ctx.rank, ids, *tables, ctx.rows
        )
    return d_x, grad if ctx.needs_input_grad[1] else None, *[None] * 10


_multi_lora.register_autograd(_grads, setup_context=_keep)
