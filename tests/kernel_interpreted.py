"""Run by `test_kernels_processes.py` with TRITON_INTERPRET=1: the kernels on a CPU.

The interpreter knows no races, no alignment and no TF32; bf16 results are cut, not rounded.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

from polyadapt.core.kernels import (
    dora_compose,
    dora_compose_triton,
    hadamard,
    hadamard_triton,
)
from polyadapt.core.kernels.paley import factor, hadamard_matrix
from polyadapt.tests.kernel_cases import (
    SCALE,
    assert_close,
    compose_case,
    gradient_case,
    guarded,
    guarding_outputs,
    guards_are_whole,
    mutant,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Smaller than a tile, one more than a tile, a single number; 33 rows are two programs backward.
SHAPES = [(3, 5), (2, 17, 257), (1, 1), (33, 40)]
SIZES = [16, 64, 384, 640]  # K = 1, 1, 12, 20


def compose_forward(
    kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, whole: bool, biased: bool
) -> None:
    """The kernel's forward is the reference's, from operands between NaN."""
    base, lora, gain, bias = (guarded(t) for t in compose_case(shape, dtype))
    rest = (SCALE, bias if biased else None, whole)
    found = kernels.forward(base, lora, gain, *rest)
    assert_close(found, dora_compose.reference(base, lora, gain, *rest))


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compose_is_the_reference_and_stays_inside_its_buffers(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = guarding_outputs(monkeypatch.setattr, dora_compose_triton)
    for whole, biased in ((False, False), (True, True)):
        compose_forward(dora_compose_triton, shape, dtype, whole, biased)
    assert len(made) == 2
    assert all(guards_are_whole(t) and t.isfinite().all() for t in made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_backward_of_compose_is_the_reference_and_stays_inside_its_buffers(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = guarding_outputs(monkeypatch.setattr, dora_compose_triton)
    base, lora, gain, bias = (guarded(t) for t in compose_case(shape, dtype))
    grad = guarded(gradient_case(shape, dtype))
    for whole, biased in ((False, None), (True, bias)):
        rest = (SCALE, whole, base, lora, biased)
        found = dora_compose_triton.backward(grad, gain, *rest)
        for mine, wanted in zip(
            found, dora_compose.reference_backward(grad, gain, *rest), strict=True
        ):
            assert_close(mine, wanted)
    assert len(made) == 4
    assert all(guards_are_whole(t) and t.isfinite().all() for t in made)


def test_the_backward_of_compose_without_a_trained_gain_reads_neither_operand() -> None:
    gain, grad = 1 + torch.arange(6.0), torch.ones(2, 6)
    d_base, d_lora, *none = dora_compose_triton.backward(grad, gain, 0.5, False, None, None, None)
    assert d_base.tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]] * 2
    assert d_lora.tolist() == [[0.5, 1.0, 1.5, 2.0, 2.5, 3.0]] * 2
    assert [t.numel() for t in none] == [0, 0]


def test_compose_keeps_a_gain_beside_one_in_bf16() -> None:
    base = torch.ones(1, 4, dtype=torch.bfloat16)
    gain = torch.full((4,), 1 + 2**-10)
    out = dora_compose_triton.forward(base, torch.zeros_like(base), gain, 1.0, None, False)
    assert out.tolist() == [[2**-10] * 4]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_hadamard_is_the_reference_and_stays_inside_its_buffers(
    size: int, inverse: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = guarding_outputs(monkeypatch.setattr, hadamard_triton)
    x = guarded(gradient_case((3, size), dtype))
    k = factor(size) or 0
    matrix = guarded(hadamard.matrix(k, inverse, torch.float32, x.device))
    assert_close(hadamard_triton.forward(x, matrix), hadamard.reference(x, inverse))
    assert all(guards_are_whole(t) and t.isfinite().all() for t in made)


def test_hadamard_of_a_unit_vector_is_a_column_of_the_dense_matrix() -> None:
    dense = torch.kron(hadamard_matrix(12), hadamard.reference(4 * torch.eye(16), False).double())
    x = torch.zeros(2, 192)
    x[0, 37] = x[1, 191] = 192**0.5
    found = hadamard_triton.forward(x, hadamard_matrix(12).float())
    torch.testing.assert_close(found.double(), dense[:, [37, 191]].t(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("gain * (scale * lora)", "gain * lora"),  # the scale is forgotten
        ("(gain - 1.0) * y0", "gain * y0"),
        ("        y0 -= tl.load", "        y0 += tl.load"),
    ],
    ids=["scale", "gain", "bias"],
)
def test_a_wrong_compose_is_noticed(old: str, new: str, tmp_path: Path) -> None:
    wrong = mutant("dora_compose_triton", old, new, tmp_path)
    with pytest.raises(AssertionError):
        compose_forward(wrong, (3, 5), torch.float32, True, True)


def test_a_compose_that_leaves_its_buffers_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = mutant("dora_compose_triton", "row < rows", "row < rows + 1", tmp_path)
    made = guarding_outputs(monkeypatch.setattr, wrong)
    compose_forward(wrong, (3, 5), torch.float32, True, True)
    assert not guards_are_whole(made[0])
    base, lora, gain, bias = (guarded(t) for t in compose_case((3, 5), torch.float32))
    grad = guarded(torch.ones(3, 5))
    assert wrong.backward(grad, gain, SCALE, False, base, lora, bias)[2].isnan().all()


@pytest.mark.parametrize(
    ("old", "new"),
    [("1 / math.sqrt(size)", "1 / size"), ("tl.join(u + v, u - v)", "tl.join(u + v, v - u)")],
    ids=["scale", "sign"],
)
def test_a_wrong_hadamard_is_noticed(old: str, new: str, tmp_path: Path) -> None:
    wrong = mutant("hadamard_triton", old, new, tmp_path)
    x = gradient_case((2, 64), torch.float32)
    with pytest.raises(AssertionError):
        assert_close(wrong.forward(x, torch.ones(1, 1)), hadamard.reference(x, False))
