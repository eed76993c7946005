"""The decomposition of a weight: its signs, on any machine; who shares it; what is refused."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyadapt.core import AdaptError
from polyadapt.core.spectral import Spectrum, check_marks, decomposed
from polyadapt.tests.spectral_cases import Decomposition, by_eigenvectors, flipped
from polyadapt.tests.spectral_cases import on_another_machine as moved

SHAPES = [(5, 5), (7, 4), (4, 7), (1, 6), (6, 1), (1, 1)]


def matrix(d_out: int, d_in: int, seed: int = 0) -> Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))


def product(found: Spectrum) -> Tensor:
    return found.U * found.s @ found.V.mT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_thin_orthonormal_falling_and_the_weight(shape: tuple[int, int]) -> None:
    w = matrix(*shape)
    found, k = decomposed(w), min(shape)
    assert (found.U.shape, found.s.shape, found.V.shape) == ((shape[0], k), (k,), (shape[1], k))
    assert {t.dtype for t in (found.U, found.s, found.V)} == {torch.float32}
    assert bool((found.s[:-1] >= found.s[1:]).all())
    for vectors in (found.U, found.V):
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(k), rtol=0, atol=1e-6)
    torch.testing.assert_close(product(found), w, rtol=1e-5, atol=1e-6)


def test_the_largest_entry_of_each_left_vector_is_positive() -> None:
    found = decomposed(torch.tensor([[-3.0, 0.0, 0.0], [0.0, 0.0, 2.0]]))
    assert found.U.tolist() == [[1, 0], [0, 1]]
    assert found.s.tolist() == [3, 2]
    assert found.V.mT.tolist() == [[-1, 0, 0], [0, 0, 1]]


def test_of_entries_that_are_equal_up_to_rounding_the_first_is_positive() -> None:
    # u = (1, 1) / sqrt(2) and (1, -1) / sqrt(2): which entry is the larger is rounding
    found = decomposed(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    assert found.s.tolist() == pytest.approx([3, 1])
    assert found.U.flatten().tolist() == pytest.approx([0.5**0.5] * 3 + [-(0.5**0.5)])


@pytest.mark.parametrize("svd", [flipped, by_eigenvectors])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_other_machines_find_the_same_vectors(
    shape: tuple[int, int], svd: Callable[..., Decomposition], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = matrix(*shape)
    here = decomposed(w)
    moved(monkeypatch, svd)
    there = decomposed(w)
    assert there.U is not here.U
    for name in ("U", "s", "V"):
        torch.testing.assert_close(getattr(there, name), getattr(here, name), rtol=0, atol=1e-6)
    torch.testing.assert_close(there.mark(), here.mark(), rtol=0, atol=1e-6)


@given(d_out=st.integers(1, 8), d_in=st.integers(1, 8), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_signs_are_found_again_for_any_weight(d_out: int, d_in: int, seed: int) -> None:
    w = matrix(d_out, d_in, seed)
    here = decomposed(w)
    with pytest.MonkeyPatch.context() as patch:
        moved(patch, flipped)
        there = decomposed(w)
    assert torch.equal(there.U, here.U)
    assert torch.equal(there.V, here.V)


def test_a_low_precision_weight_is_decomposed_as_if_it_were_wide() -> None:
    w = matrix(5, 4).bfloat16()
    low, wide = decomposed(w), decomposed(w.double())
    assert torch.equal(low.U, wide.U)
    assert torch.equal(low.s, wide.s)


# Sharing


def test_all_who_hold_a_weights_decomposition_hold_the_same_tensors() -> None:
    first, again = decomposed(matrix(5, 4)), decomposed(matrix(5, 4))
    assert again.U is first.U
    assert again.V is first.V
    assert decomposed(matrix(5, 4, seed=1)).U is not first.U
    assert decomposed(matrix(5, 4), repeatable=False).U is not first.U


def test_a_decomposition_that_nobody_holds_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(w: Tensor, full_matrices: bool = False) -> Decomposition:
        calls.append(w)
        return flipped(w)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    w = matrix(9, 8)
    first = decomposed(w)
    again = decomposed(w.clone())
    assert len(calls) == 1
    del first, again
    gc.collect()
    decomposed(w)
    assert len(calls) == 2


def test_what_is_made_in_inference_mode_can_be_trained_with() -> None:
    with torch.inference_mode():
        found = decomposed(matrix(6, 3, seed=2))
    assert not found.U.is_inference()
    assert not found.s.is_inference()


def test_shapes_are_enough_for_a_weight_without_numbers() -> None:
    found = decomposed(torch.empty(2304, 768, device="meta"))
    assert (found.U.shape, found.V.shape, found.mark().shape) == ((2304, 768), (768, 768), (768,))
    assert found.U.is_meta


# Marks


def test_a_mark_tells_a_flip_of_either_vector_and_a_turn_of_two() -> None:
    found = decomposed(matrix(6, 5))
    mark = found.mark()
    for vectors in (found.U, found.V):
        kept = vectors.clone()
        vectors[:, 2] *= -1
        changed = (found.mark() - mark).abs()
        assert changed[2] > 1e-2
        assert changed.count_nonzero() == 1
        turn = torch.tensor([[1.0, -1e-3], [1e-3, 1.0]])
        vectors.copy_(kept)
        vectors[:, :2] = vectors[:, :2] @ turn
        assert bool(((found.mark() - mark).abs()[:2] > 1e-5).all())
        vectors.copy_(kept)


def test_a_mark_of_another_basis_is_refused_by_site_and_number() -> None:
    mark = decomposed(matrix(6, 5)).mark()
    other = mark.clone()
    other[3] += 1e-4
    near = mark + 1e-6
    check_marks({"0/mark": near, "0/a": mark, "1/a": mark}, {"0/mark": mark})
    with pytest.raises(AdaptError, match=r"^0: singular vector 4 of its weight is not the one"):
        check_marks({"0/mark": other}, {"0/mark": mark})


# What is refused


@pytest.mark.parametrize(
    ("w", "words"),
    [
        (torch.eye(3), "singular values 1 and 2 are equal"),
        (torch.diag(torch.tensor([3.0, 2.0, 2.0])), "singular values 2 and 3 are equal"),
        (torch.diag(torch.tensor([3.0, 2.0, 0.0])), "singular values 3 is 0"),
        (torch.zeros(2, 3), "singular values 1 and 2 are equal"),
        (torch.tensor([[float("nan")]]), "NaN or infinity"),
        (torch.tensor([[float("inf"), 1.0]]), "NaN or infinity"),
    ],
)
def test_vectors_that_cannot_be_found_again_are_refused(w: Tensor, words: str) -> None:
    with pytest.raises(AdaptError, match=words) as refused:
        decomposed(w)
    assert "\n" not in str(refused.value)


def test_where_they_are_kept_equal_values_are_allowed() -> None:
    found = decomposed(torch.eye(3), repeatable=False)
    assert torch.equal(product(found), torch.eye(3))
    with pytest.raises(AdaptError, match="NaN or infinity"):
        decomposed(torch.tensor([[float("nan")]]), repeatable=False)


def test_a_gap_of_a_millionth_is_wide_enough() -> None:
    w = torch.diag(torch.tensor([1.0, 1 - 1e-6, 0.5], dtype=torch.float64))
    assert torch.equal(decomposed(w).U.abs(), torch.eye(3))
