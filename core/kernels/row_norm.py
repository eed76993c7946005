"""n_i = ||(W0 + s B A)_i|| for every row i, without a buffer of W0's size.

exact: the rows of W0 + s B A are made piece by piece and their norms taken at once. factored
(arXiv 2603.22276 section 3): n^2 = ||w||^2 + 2 s b (A w) + s^2 b (A A^T) b^T for a row w of W0 and
b of B. With u the unit roundoff and p = ||w|| + |s| sum_l |b_l| ||A_l||, which is at least n,
rounding moves n to first order at most by the share

    exact     (r + 2) u p / n + (d_in + 2) u / 2
    factored  (d_in + 2 r + 6) u / 2 (p / n)^2

A term of the square errs by its own length times the sizes that went into it, and these sizes add
up to p^2; halving is the root's. So where the update cancels the row the factored form loses twice
the digits. It is believed up to p = 2 n, where it has lost at most two bits.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import AdaptError
from ..precision import widened, without_autocast
from .dispatch import floating, runs_kernel, shaped

OP = "row_norm"
Method = Literal["exact", "factored", "auto"]
# 4 MiB of fp32: the chunk stays in a core's cache. On a CPU, 2^16 to 2^24 were within 1.4 of each
# other for a 4096 x 4096 weight, this one the fastest; on a GPU fewer chunks are fewer launches.
CHUNK_ELEMENTS = 2**20
BELIEVED = 0.5  # n / p from which on the factored form is
# Multiply-adds in fp32 in the time that one number takes to memory: 20 on an A100, by its sheet.
NUMBER_MOVED = 20


def row_norm(w0: Tensor, a: Tensor, b: Tensor, scale: float, method: Method = "exact") -> Tensor:
    """n [d_out] of W0 [d_out, d_in], A [r, d_in], B [d_out, r] and s, without gradient.

    In fp32, whatever the operands' dtypes and autocast are; in fp64 if one of them is. `factored`
    computes the rows whose bound does not hold exactly, `auto` chooses what should be faster:
    `exact` on a CPU, where it was measured, and where a kernel runs. Raises `AdaptError` for
    shapes that do not fit, several devices, numbers that do not float and unknown methods.

    >>> row_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 1), 2.0)
    tensor([6.4031])
    """
    _check(w0, a, b, scale, method)
    # The compiler sees one operation; without it the reference needs no detour through an op.
    run = _as_op if torch.compiler.is_compiling() else _run
    norm: Tensor = run(w0.detach(), a.detach(), b.detach(), float(scale), method)
    return norm


def _check(w0: Tensor, a: Tensor, b: Tensor, scale: float, method: str) -> None:
    floating(OP, w0=w0, a=a, b=b)
    for name, tensor in (("w0", w0), ("a", a)):
        if tensor.dim() != 2:
            raise AdaptError(f"{OP}: {name} is {list(tensor.shape)}, not a matrix")
    shaped(OP, "a", a, (a.shape[0], w0.shape[1]))
    shaped(OP, "b", b, (w0.shape[0], a.shape[0]))
    if not math.isfinite(scale):
        raise AdaptError(f"{OP}: scale {scale} is not a finite number")
    if method not in get_args(Method):
        raise AdaptError(f"{OP}: method {method!r} is none of {', '.join(get_args(Method))}")


def _run(w0: Tensor, a: Tensor, b: Tensor, scale: float, method: str) -> Tensor:
    fused = method != "factored" and all(runs_kernel(t) for t in (w0, a, b))
    if fused:
        from . import row_norm_triton

        launched: Tensor = row_norm_triton.forward(w0, a, b, scale)
        return launched
    if method == "factored" or (method == "auto" and factored_is_cheaper(w0, len(a))):
        return _mended(w0, a, b, scale)
    return exact(w0, a, b, scale)


def factored_is_cheaper(w0: Tensor, rank: int) -> bool:
    """Whether plain PyTorch saves time on this device by the factored form.

    Both multiply W0 or its size with r numbers once. The factored form neither writes nor reads
    the update, 2 d_out d_in numbers, reads W0 once more, and multiplies with the Gram matrix.
    """
    saved = NUMBER_MOVED * w0.numel()
    return w0.device.type != "cpu" and rank * rank * sum(w0.shape) < saved


def exact(w0: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The reference: product and norm of as many rows at once as a chunk holds."""
    wide = _wide(w0, a, b)
    w0, a, b = w0.detach(), a.detach().to(wide), b.detach()
    norms = [
        torch.linalg.vector_norm(_moved(w0[rows], a, b[rows], scale), dim=1) for rows in _chunks(w0)
    ]
    return torch.cat(norms) if norms else w0.new_empty(0, dtype=wide)


def _moved(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Rows of W0 + s B A; where s is 0 those of W0, as 0 * NaN would be NaN."""
    return widened(w, a, b, scale) if scale else w.to(a.dtype)


def factored(w0: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The published form: n, and in which rows it may be believed.

    Never in one with NaN, and in none where torch multiplies fp32 with fewer digits (TF32). The
    paper adds up over columns and so keeps [d_out, r] or [d_out] numbers; rows need neither.
    """
    wide = _wide(w0, a, b)
    w0, a, b = w0.detach(), a.detach().to(wide), b.detach().to(wide)
    with without_autocast(w0):
        gram = a @ a.t() if scale else None
        norm, most = w0.new_empty(2, len(w0), dtype=wide)
        for rows in _chunks(w0):
            norm[rows], most[rows] = _factored(w0[rows].to(wide), a, b[rows], gram, scale)
    believed = (norm >= BELIEVED * most) & norm.isfinite()
    return norm, believed if _multiplies_in(wide, w0.device) else torch.zeros_like(believed)


def _multiplies_in(dtype: torch.dtype, device: torch.device) -> bool:
    backend: Any = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    return dtype == torch.float64 or backend.matmul.fp32_precision in ("none", "ieee")


def _factored(
    w: Tensor, a: Tensor, b: Tensor, gram: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """n and p of a chunk."""
    base = w.square().sum(1)
    length = base.sqrt()
    if gram is None:
        return length, length
    cross, update = ((w @ a.t()) * b).sum(1), ((b @ gram) * b).sum(1)
    squared = base + 2 * scale * cross + scale**2 * update
    most = length + abs(scale) * (b.abs() @ gram.diagonal().sqrt())
    return squared.clamp_min(0).sqrt(), most


def _mended(w0: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The factored form where it may be believed, the exact one elsewhere."""
    norm, believed = factored(w0, a, b, scale)
    for rows in (~believed).nonzero().flatten().split(_rows_of_a_chunk(w0)):
        norm[rows] = exact(w0[rows], a, b[rows], scale)
    return norm


def _wide(*tensors: Tensor) -> torch.dtype:
    double = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def _rows_of_a_chunk(w0: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // max(1, w0.shape[1]))


def _chunks(w0: Tensor) -> list[slice]:
    step = _rows_of_a_chunk(w0)
    return [slice(start, start + step) for start in range(0, w0.shape[0], step)]


_as_op = torch.library.custom_op(f"polyadapt::{OP}", _run, mutates_args=())


@_as_op.register_fake
def _(w0: Tensor, a: Tensor, b: Tensor, scale: float, method: str) -> Tensor:
    return w0.new_empty(w0.shape[0], dtype=_wide(w0, a, b))
