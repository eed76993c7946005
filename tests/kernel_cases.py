"""Operands of the kernels, buffers with guards around them, and how close a result must be.

Kernels run in processes of their own (`kernel_interpreted*.py`, `kernel_compiled*.py`, started by
`test_kernels_processes.py`): Triton reads the variable that chooses its interpreter when it is
imported, and compiles nothing in such a process.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from polyadapt.core import kernels

KERNELS = Path(kernels.__path__[0])
GUARD = 64  # numbers before and behind a guarded tensor
UNTOUCHED = 7.0  # of an output; a kernel that reads NaN behind its operands would write NaN
# Of the largest number: fp32 by the rounding of a few operations; the others by one unit of their
# last place, as the interpreter cuts bits off where a GPU rounds to the nearest.
ONE_ULP = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SCALE = 0.75


def guarded(values: Tensor, guard: float = torch.nan) -> Tensor:
    """A contiguous copy with NaN on both sides in memory: reading past its ends shows."""
    buffer = torch.full((values.numel() + 2 * GUARD,), guard).to(values)
    inside = buffer[GUARD : GUARD + values.numel()].view(values.shape)
    return inside.copy_(values)


def guards_are_whole(inside: Tensor) -> bool:
    """Nothing was written beside an output."""
    whole = inside.as_strided((inside.numel() + 2 * GUARD,), (1,), inside.storage_offset() - GUARD)
    return bool((whole[:GUARD] == UNTOUCHED).all() and (whole[-GUARD:] == UNTOUCHED).all())


def guarding_outputs(patch: Callable[..., Any], module: Any) -> list[Tensor]:
    """Let a module that calls `torch.empty_like` get guarded tensors; the list of them."""
    made: list[Tensor] = []

    def empty_like(t: Tensor) -> Tensor:
        made.append(guarded(torch.full_like(t, torch.nan), UNTOUCHED))
        return made[-1]

    patch(module.torch, "empty_like", empty_like)
    return made


def mutant(name: str, old: str, new: str, folder: Path) -> ModuleType:
    """A module of kernels with one piece of its text replaced."""
    text = (KERNELS / f"{name}.py").read_text()
    assert old in text
    path = folder / f"{name}_mutant.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Within a unit of the last place of each number, and in fp32 of the largest."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    bound = ONE_ULP[wanted.dtype]
    at_zero = 2e-6 * max(1.0, wanted.abs().float().max().item() if wanted.numel() else 0.0)
    torch.testing.assert_close(found, wanted, rtol=bound, atol=at_zero)


def compose_case(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """base, lora, gain, bias: gains beside 1, as DoRA trains them."""
    made = torch.Generator().manual_seed(sum(shape))
    base, lora = (torch.randn(shape, generator=made).to(device, dtype) for _ in range(2))
    gain, bias = (torch.randn(shape[-1], generator=made).to(device) for _ in range(2))
    return [base, lora / 4, 1 + 0.1 * gain, bias.to(dtype)]


def gradient_case(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """What arrives from behind."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def norm_case(
    shape: tuple[int, int],
    rank: int,
    dtype: torch.dtype,
    factors: torch.dtype | None = None,
    device: str = "cpu",
) -> list[Tensor]:
    """W0, A, B with an update about as long as W0; the factors in W0's dtype unless told."""
    made = torch.Generator().manual_seed(sum(shape) + rank)
    rows, columns = shape
    shapes = (shape, (rank, columns), (rows, rank))
    w0, a, b = (torch.randn(s, generator=made, dtype=torch.float64) for s in shapes)
    b /= max(1, rank) ** 0.5
    return [w0.to(device, dtype), *(t.to(device, factors or dtype) for t in (a, b))]
