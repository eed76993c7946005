"""`hadamard`: Paley's matrices, the transform beside the dense product, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.core.kernels.hadamard import fits, hadamard
from polyadapt.core.kernels.paley import LARGEST, factor, hadamard_matrix
from polyadapt.tests.kernel_cases import ONE_ULP

# Of QWHA's sizes, and the issue's: 12 * 32, 12 * 64, 2^10, 20 * 64, 12 * 256; 28 * 32, 36 * 4.
SIZES = [1, 2, 4, 12, 24, 144, 384, 768, 896, 1024, 1280, 3072]


def dense(size: int) -> Tensor:
    """H_K kron H_2 kron H_2 ..., by definition."""
    matrix = hadamard_matrix(factor(size) or 0)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1], [1, -1]]).double())
    return matrix


def test_every_order_of_paley_up_to_the_largest_is_a_hadamard_matrix() -> None:
    # By either construction: 11 + 1 = 12 and 2 (5 + 1) = 12 are one order, 2 (13 + 1) = 28.
    orders = [k for k in range(1, LARGEST + 1) if factor(k) == k]
    assert {1, 12, 20, 28, 36, 44, 60, 68, 76} <= {*orders}
    for order in orders:
        matrix = hadamard_matrix(order)
        assert {*matrix.unique().tolist()} <= {-1.0, 1.0}
        assert torch.equal(matrix @ matrix.T, order * torch.eye(order).double())


def test_an_order_without_a_construction_is_refused() -> None:
    with pytest.raises(ValueError, match="no matrix of order 92"):  # 91 = 7 * 13, 45 = 9 * 5
        hadamard_matrix(92)


def test_four_numbers_by_hand() -> None:
    rows = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert (2 * hadamard(torch.eye(4))).tolist() == rows
    assert dense(4).tolist() == rows


def test_one_coefficient_of_four_keeps_a_quarter_of_a_unit_vector() -> None:
    spectrum = hadamard(torch.tensor([1.0, 0, 0, 0]))
    assert spectrum.tolist() == [0.5] * 4
    rebuilt = hadamard(spectrum * torch.tensor([1.0, 0, 0, 0]), inverse=True)
    assert rebuilt.tolist() == [0.25] * 4
    assert (rebuilt - torch.tensor([1.0, 0, 0, 0])).square().sum() == 0.75


@pytest.mark.parametrize("size", SIZES)
def test_the_fast_transform_is_the_dense_one_and_its_inverse_undoes_it(size: int) -> None:
    x = torch.randn(2, 3, size, dtype=torch.float64)
    matrix = dense(size) / size**0.5
    torch.testing.assert_close(hadamard(x), x @ matrix.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard(x, inverse=True), x @ matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard(hadamard(x), inverse=True), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ONE_ULP, ids=str)
def test_narrow_numbers_are_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(4, 384).to(dtype)
    exact = hadamard(x.double())
    error = (hadamard(x).double() - exact).abs()
    assert bool((error <= ONE_ULP[dtype] * exact.abs() + 2e-6).all())


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_first_and_second_derivatives(inverse: bool) -> None:
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hadamard(x, inverse), x)
    assert torch.autograd.gradgradcheck(lambda x: hadamard(x, inverse), x)


def test_strided_rows_and_empty_batches() -> None:
    x = torch.randn(12, 5)
    assert torch.equal(hadamard(x.t()), hadamard(x.t().contiguous()))
    assert hadamard(x.t()).is_contiguous()
    assert hadamard(torch.ones(0, 384)).shape == (0, 384)
    assert hadamard(torch.ones(2, 0, 8)).shape == (2, 0, 8)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.ones(2, 197), "x has rows of 197, .*: the nearest sizes are 196 and 200"),
        (torch.ones(2, 11008), "x has rows of 11008, .*: the nearest sizes are"),  # 43 * 256
        (torch.ones(2, 0), "x has rows of 0, .*: the nearest sizes are 1$"),
        (torch.ones(4, dtype=torch.long), "x is torch.int64, not"),
        (torch.tensor(1.0), "x is a single number"),
    ],
    ids=["odd", "without a construction", "none", "integers", "a number"],
)
def test_what_does_not_fit_is_named(x: Tensor, says: str) -> None:
    with pytest.raises(AdaptError, match=f"^hadamard: {says}"):
        hadamard(x)


def test_the_kernel_takes_rows_of_whole_words_that_fit_into_one_program() -> None:
    taken = [16, 384, 768, 1024, 1280, 3072, 14336, 16384]
    assert [fits(n) for n in taken] == [True] * len(taken)
    assert [fits(n) for n in (8, 24, 32768)] == [False] * 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it of its copies
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_torch_accepts_the_registration_and_compiles_it(inverse: bool) -> None:
    x = torch.randn(2, 24, requires_grad=True)
    torch.library.opcheck(torch.ops.polyadapt.hadamard.default, (x, inverse))
    compiled = torch.compile(hadamard, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, inverse), hadamard(x, inverse))
    towards = torch.randn(2, 24)
    (found,) = torch.autograd.grad(compiled(x, inverse), x, towards)
    torch.testing.assert_close(found, hadamard(towards, not inverse))
