"""The Walsh-Hadamard transform of sizes K 2^m, as QWHA trains in it (arXiv 2509.17428 section 3).

H_n = H_K kron H_2^m, H_2^m in natural (Sylvester's) order, H_K from `paley`. The paper's code
takes other matrices for K > 1 and divides by n on the way back; ours is orthonormal on both.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..errors import AdaptError
from .dispatch import floating, runs_kernel
from .paley import factor, hadamard_matrix, sizes_beside

OP = "hadamard"
# The widest tile that a program holds, and the narrowest rows that it reads in whole words.
LARGEST_TILE, SMALLEST_POWER = 16384, 16


def hadamard(x: Tensor, inverse: bool = False) -> Tensor:
    """H_n x / sqrt(n) along the last dimension, or its inverse H_n^T x / sqrt(n).

    n = K 2^m takes n (K + m) sums in fp32 (fp64 for fp64), rounded once to x's dtype. K is 1, 12,
    20, 28, ...: the smallest multiple of n's odd part that a construction of Paley's gives.
    Raises `AdaptError` for other sizes, naming the nearest, and for numbers that do not float.

    >>> hadamard(torch.tensor([1.0, 0, 0, 0]))
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    floating(OP, x=x)
    if x.dim() == 0:
        raise AdaptError(f"{OP}: x is a single number, not [..., n]")
    if factor(x.shape[-1]) is None:
        below, above = sizes_beside(x.shape[-1])
        near = f"{above}" if below is None else f"{below} and {above}"
        raise AdaptError(
            f"{OP}: x has rows of {x.shape[-1]}, not K 2^m with K = 1, 12, 20, 28, ...: "
            f"the nearest sizes are {near}"
        )
    result: Tensor = _hadamard(x, inverse)
    return result


def reference(x: Tensor, inverse: bool) -> Tensor:
    """The transform in PyTorch: m butterflies on 2^m neighbours, then H_K across them."""
    size = x.shape[-1]
    k = factor(size) or 1
    wide = torch.promote_types(x.dtype, torch.float32)
    y, half = x.to(wide), 1
    while half < size // k:
        u, v = y.reshape(x.numel() // (2 * half), 2, half).unbind(1)
        y = torch.stack((u + v, u - v), dim=1)
        half *= 2
    if k > 1:
        y = matrix(k, inverse, wide, x.device) @ y.reshape(x.numel() // size, k, size // k)
    return (y * (1 / math.sqrt(size))).to(x.dtype).reshape(x.shape)


@functools.lru_cache(maxsize=64)
def matrix(k: int, inverse: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """H_K or its transpose, kept per device."""
    h = hadamard_matrix(k)
    return (h.t() if inverse else h).contiguous().to(device, dtype)


def fits(size: int) -> bool:
    """Whether the kernel takes rows of this size."""
    k = factor(size) or 1
    power = size // k
    rows = 1 if k == 1 else max(16, 1 << (k - 1).bit_length())
    return power >= SMALLEST_POWER and rows * power <= LARGEST_TILE


@torch.library.custom_op(f"polyadapt::{OP}", mutates_args=())
def _hadamard(x: Tensor, inverse: bool) -> Tensor:
    x = x.contiguous()
    if runs_kernel(x) and fits(x.shape[-1]):
        from . import hadamard_triton

        k = factor(x.shape[-1]) or 1
        run: Tensor = hadamard_triton.forward(x, matrix(k, inverse, torch.float32, x.device))
        return run
    return reference(x, inverse)


@_hadamard.register_fake
def _(x: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.inverse = inputs[1]


def _grads(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _hadamard(grad, not ctx.inverse), None


_hadamard.register_autograd(_grads, setup_context=_keep)
