"""Run by `test_kernels_processes.py` with TRITON_INTERPRET=1: `row_norm`'s kernel on a CPU."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from polyadapt.core.kernels import row_norm_triton
from polyadapt.core.kernels.row_norm import exact
from polyadapt.tests.kernel_cases import (
    SCALE,
    UNTOUCHED,
    assert_close,
    guarded,
    guards_are_whole,
    mutant,
    norm_case,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Less than a tile, one more than a tile, a span and a tile of ranks, a single number, whole tiles.
CASES = [((3, 5), 2), ((33, 513), 17), ((1, 1), 1), ((32, 128), 16)]


def guarding_sums(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Let the sums of spans be guarded tensors; the list of them."""
    made: list[Tensor] = []

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append(guarded(torch.full(shape, torch.nan, dtype=dtype, device=device), UNTOUCHED))
        return made[-1]

    monkeypatch.setattr(torch, "empty", empty)
    return made


def check(kernels: ModuleType, case: list[Tensor], scale: float = SCALE) -> None:
    """The kernel's norms are the reference's, from operands between NaN."""
    w0, a, b = (guarded(t) for t in case)
    assert_close(kernels.forward(w0, a, b, scale), exact(w0, a, b, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "rank"), CASES, ids=str)
def test_the_norm_is_the_reference_and_stays_inside_its_buffers(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = guarding_sums(monkeypatch)
    check(row_norm_triton, norm_case(shape, rank, dtype))
    check(row_norm_triton, norm_case(shape, rank, dtype, torch.float32))
    assert len(made) == 2
    assert all(guards_are_whole(t) and t.isfinite().all() for t in made)


def test_a_weight_that_is_stored_transposed_is_read_where_it_lies() -> None:
    w0, a, b = norm_case((40, 24), 5, torch.float32)
    transposed = guarded(w0.t()).t()
    wanted = exact(w0, a, b, SCALE)
    assert_close(row_norm_triton.forward(transposed, a, b, SCALE), wanted)
    part = torch.full((80, 48), torch.nan)
    part[1::2, ::2] = w0
    assert_close(row_norm_triton.forward(part[1::2, ::2], a, b, SCALE), wanted)


def test_strided_factors_give_the_numbers_of_contiguous_ones() -> None:
    w0, a, b = norm_case((6, 8), 3, torch.float32)
    strided = (a.repeat(1, 2)[:, :8], b.t().contiguous().t())
    wanted = row_norm_triton.forward(w0, a, b, SCALE)
    assert torch.equal(row_norm_triton.forward(w0, *strided, SCALE), wanted)


def test_a_scale_of_zero_reads_no_factor_and_nan_in_a_weight_stays() -> None:
    w0, a, b = norm_case((5, 6), 2, torch.float32)
    w0[1, 2] = torch.nan
    found = row_norm_triton.forward(w0, torch.full_like(a, torch.nan), b, 0.0)
    assert found.isnan().tolist() == [False, True, False, False, False]
    assert_close(found[2:], w0[2:].norm(dim=1))
    found = row_norm_triton.forward(w0, a, b, SCALE)
    assert found.isnan().tolist() == [False, True, False, False, False]


def test_it_is_exact_where_the_update_cancels_the_weight() -> None:
    e = 2393 * 2**-23  # the published form is off by a fifth here
    one = torch.ones(1, 1)
    assert row_norm_triton.forward(torch.tensor([[1 + e]]), one, one, -1.0).item() == e


MUTANTS = [
    pytest.param("w += scale * update", "w += update", id="scale"),
    pytest.param("sums += tl.sum", "sums = tl.sum", id="sums"),
    pytest.param("there[:, None] & within", "within", id="ranks"),
    pytest.param("(column < right", "(column <= right", id="columns"),
    pytest.param("range(0, tl.minimum", "range(COLUMNS, tl.minimum", id="span"),
]


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_a_wrong_kernel_is_noticed(old: str, new: str, tmp_path: Path) -> None:
    wrong = mutant("row_norm_triton", old, new, tmp_path)
    with pytest.raises(AssertionError):
        check(wrong, norm_case((3, 140), 5, torch.float32))


def test_a_kernel_that_leaves_its_buffers_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = mutant("row_norm_triton", "mask=row < below)", "mask=row <= below)", tmp_path)
    made = guarding_sums(monkeypatch)
    check(wrong, norm_case((3, 5), 2, torch.float32))
    assert not guards_are_whole(made[0])
