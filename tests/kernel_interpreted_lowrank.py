"""Run by `test_kernels_processes.py` with TRITON_INTERPRET=1: `lowrank_linear`'s kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from polyadapt.core.kernels import lowrank_linear_triton
from polyadapt.core.kernels.lowrank_orders import Call, by_column, reference, up_again
from polyadapt.tests.kernel_cases import (
    UNTOUCHED,
    assert_close,
    gradient_case,
    guarded,
    guards_are_whole,
    mutant,
)
from polyadapt.tests.lowrank_cases import SCALE, lowrank_case

Case = tuple[int, tuple[int, int, int]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Tokens, then d_in, d_out, rank: less than a tile, more than one (of ranks, too), one number.
CASES: list[Case] = [(3, (5, 4, 2)), (70, (130, 65, 17)), (65, (64, 64, 40)), (1, (1, 1, 1))]
EXTRAS = {
    "plain": (),
    "weights-bias": ("weights", "bias"),
    "gain": ("gain", "bias"),
    "base": ("base",),
    "base-all": ("base", "weights", "gain", "bias"),
}


class Pinned:
    """A kernel without its tuner, which asks for a GPU; bf16 is wide before a product."""

    def __init__(self, kernel: Any, dtype: torch.dtype, **options: int) -> None:
        self.kernel, self.options = kernel, {**options, "UPCAST": dtype == torch.bfloat16}

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> None:
            self.kernel[grid](*args, **options, **self.options)

        return launch


def pin(patch: pytest.MonkeyPatch, kernels: ModuleType, dtype: torch.dtype) -> None:
    """Let a module launch its smallest tiles."""
    for name, tiles in (("whole", kernels.WHOLE[0]), ("beside", kernels.BESIDE[0])):
        patch.setattr(kernels, name, Pinned(kernels.product, dtype, **tiles.kwargs))
    patch.setattr(kernels, "one_pass", Pinned(kernels.one_pass, dtype))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every output is guarded; the list of them."""
    outputs: list[Tensor] = []

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        outputs.append(guarded(torch.full(shape, torch.nan, dtype=dtype), UNTOUCHED))
        return outputs[-1]

    monkeypatch.setattr(torch, "empty", empty)
    yield outputs
    assert outputs
    assert all(guards_are_whole(t) and t.isfinite().all() for t in outputs)


def call_of(dtype: torch.dtype, case: Case, extra: tuple[str, ...] = ()) -> tuple[Call, Tensor]:
    """A call whose operands lie between NaN, and its v. A gain is exact in every dtype."""
    tokens, sizes = case
    made = lowrank_case(dtype, (tokens,), sizes)
    made["gain"] = 2.0 ** torch.arange(sizes[1]).remainder(3).sub(1)
    operands: dict[str, Any] = {n: guarded(made[n]) for n in ("x", "a", "b", *extra)}
    w0 = None if "base" in extra else guarded(made["w0"])
    call = Call(w0=w0, scale=SCALE, **operands)
    return call, guarded(call.down())


def widened(call: Call) -> Call:
    """The same numbers in fp32: what a sum in fp32 gives."""
    held = {f.name: getattr(call, f.name) for f in fields(call)}
    wide: Any = {n: t.float() if isinstance(t, Tensor) else t for n, t in held.items()}
    return Call(**wide)


def gradients(kernels: ModuleType, dtype: torch.dtype, case: Case, extra: tuple[str, ...]) -> None:
    """The kernel's Z and dB are those of the two products."""
    call, v = call_of(dtype, case, extra)
    grad = guarded(gradient_case((case[0], case[1][1]), dtype))
    z, d_b = kernels.backward(call, grad, v)
    wide = widened(call)
    for found, wanted in (
        (z, up_again(wide, grad.float())),
        (d_b, by_column(wide, grad.float(), v.float())),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_product_is_the_reference_and_stays_inside_its_buffers(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, made: list[Tensor]
) -> None:
    pin(monkeypatch, lowrank_linear_triton, dtype)
    for extra in EXTRAS.values():
        call, v = call_of(dtype, case, extra)
        assert_close(lowrank_linear_triton.forward(call, v), reference(call, v))
    assert len(made) == len(EXTRAS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[3], (70, (9, 300, 17))], ids=str)
@pytest.mark.parametrize("extra", [(), ("gain",)], ids=["plain", "gain"])
def test_the_backward_is_two_products_and_stays_inside_its_buffers(
    case: Case,
    extra: tuple[str, ...],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    made: list[Tensor],
) -> None:
    pin(monkeypatch, lowrank_linear_triton, dtype)
    gradients(lowrank_linear_triton, dtype, case, extra)
    assert len(made) == 2


def test_a_program_of_several_steps_sums_over_all_of_its_rows(
    monkeypatch: pytest.MonkeyPatch, made: list[Tensor]
) -> None:
    pin(monkeypatch, lowrank_linear_triton, torch.float32)
    monkeypatch.setattr(lowrank_linear_triton, "PROGRAMS", 2)
    gradients(lowrank_linear_triton, torch.float32, (200, (9, 20, 3)), ())
    assert [t.shape[0] for t in made] == [1, 2]  # 4 tiles of rows: 2 programs of 2 steps


@pytest.mark.parametrize("tiles", [0, 1, 2])
def test_every_tile_gives_the_same_numbers(tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call, v = call_of(torch.float32, (130, (70, 130, 3)), ("bias",))
    found = []
    for chosen in (lowrank_linear_triton.WHOLE[tiles], lowrank_linear_triton.WHOLE[0]):
        pinned = Pinned(lowrank_linear_triton.product, torch.float32, **chosen.kwargs)
        monkeypatch.setattr(lowrank_linear_triton, "whole", pinned)
        found.append(lowrank_linear_triton.forward(call, v))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_a_transposed_weight_and_a_part_of_an_output_are_read_as_they_lie(
    monkeypatch: pytest.MonkeyPatch, made: list[Tensor]
) -> None:
    pin(monkeypatch, lowrank_linear_triton, torch.float32)
    call, v = call_of(torch.float32, (7, (9, 5, 2)))
    turned = replace(call, w0=guarded(call.weight.t()).t())
    assert turned.weight.stride() == (1, 5)
    assert_close(lowrank_linear_triton.forward(turned, v), reference(call, v))
    whole = torch.full((7, 11), torch.nan)
    part = whole[:, 3:8].copy_(lowrank_case(torch.float32, (7,), (9, 5, 2))["base"])
    based = replace(call, w0=None, base=part)
    assert_close(lowrank_linear_triton.forward(based, v), reference(based, v))


MUTANTS = [
    ("    total *= scale\n", ""),
    ("(v.to(tl.float32) * weights[None, :])", "(v.to(tl.float32))"),
    ("total -= bias[None, :]", "total -= 0.0"),
    ("        total *= tl.load(gain_ptr", "        total += tl.load(gain_ptr"),
    ("if WITH_GAIN or not WITH_BASE", "if not WITH_BASE"),
]


@pytest.mark.parametrize(
    ("old", "new"), MUTANTS, ids=["scale", "weights", "bias", "gain", "late bias"]
)
def test_a_wrong_product_is_noticed(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = mutant("lowrank_linear_triton", old, new, tmp_path)
    pin(monkeypatch, wrong, torch.float32)
    call, v = call_of(torch.float32, CASES[0], EXTRAS["base-all"])
    with pytest.raises(AssertionError):
        assert_close(wrong.forward(call, v), reference(call, v))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("z * scale", "z"),
        ("d_b *= scale * gain[:, None]", "d_b *= scale"),
        ("d_b *= scale * gain[:, None]", "d_b *= gain[:, None]"),
        ("d_b = tl.dot(tl.trans(grad), v, d_b", "d_b = tl.dot(tl.trans(grad), v, d_b * 0"),
    ],
    ids=["scale of Z", "gain", "scale of dB", "last step alone"],
)
def test_a_wrong_backward_is_noticed(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = mutant("lowrank_linear_triton", old, new, tmp_path)
    pin(monkeypatch, wrong, torch.float32)
    monkeypatch.setattr(wrong, "PROGRAMS", 1)
    with pytest.raises(AssertionError):
        gradients(wrong, torch.float32, (70, (5, 4, 2)), ("gain",))


@pytest.mark.parametrize("size", ["tokens", "d_out"])
def test_a_product_that_leaves_its_buffers_is_noticed(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = mutant("lowrank_linear_triton", f"< {size}", f"< {size} + 1", tmp_path)
    pin(monkeypatch, wrong, torch.float32)
    outputs: list[Tensor] = []

    def empty(*shape: int, **_: Any) -> Tensor:
        outputs.append(guarded(torch.full(shape, 0.0), UNTOUCHED))
        return outputs[-1]

    call, v = call_of(torch.float32, CASES[0])
    monkeypatch.setattr(torch, "empty", empty)
    wrong.forward(call, v)
    assert not (guards_are_whole(outputs[0]) and outputs[0].isfinite().all())
