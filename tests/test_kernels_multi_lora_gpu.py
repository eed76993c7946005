"""`multi_lora` on a GPU, beside its reference; left out where there is none."""

from __future__ import annotations

import pytest
import torch

from polyadapt.core.kernels.multi_lora import multi_lora, reference
from polyadapt.core.kernels.segments import segments
from polyadapt.tests.kernel_cases import ONE_ULP
from polyadapt.tests.served_cases import Served, served_case

pytestmark = pytest.mark.gpu
# A token per id and an image's, sizes that are multiples of 16 and that are not.
SHAPES = [(1, (768, 768)), (197, (384, 1000)), (5, (70, 1))]

by_dtype = pytest.mark.parametrize("dtype", ONE_ULP, ids=str)
by_shape = pytest.mark.parametrize(("tokens", "sizes"), SHAPES, ids=str)


def on_a_gpu(tokens: int, sizes: tuple[int, int], dtype: torch.dtype) -> Served:
    return served_case([1, 4, 0, 16, 100], tokens, dtype, "cuda", sizes)


@by_dtype
@by_shape
def test_it_is_its_reference_and_always_the_same_bits(
    tokens: int, sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    case = on_a_gpu(tokens, sizes, dtype)
    found, kept = case.run(), segments(case.ids, 5, tokens)
    wanted = reference(case.x.double(), case.y.double(), case.sets, case.ids)
    # 10 of v's digits are multiplied in 16 bits; v and B's rows add up to 100 terms.
    within = 1e-4 if dtype == torch.float32 else 2**-8
    largest = wanted.abs().max().item()
    torch.testing.assert_close(
        found.double(), wanted, rtol=2 * ONE_ULP[dtype], atol=within * largest
    )
    assert torch.equal(found[case.ids < 0], case.y[case.ids < 0])
    assert torch.equal(found, multi_lora(case.x, case.y, case.sets, case.ids, kept))
    order = torch.randperm(len(case.ids), device="cuda")
    mixed = multi_lora(case.x[order], case.y[order], case.sets, case.ids[order])
    assert torch.equal(mixed, found[order])


@by_dtype
def test_the_gradients_are_those_of_the_reference(dtype: torch.dtype) -> None:
    case = on_a_gpu(7, (64, 96), dtype)
    x, y = case.x.requires_grad_(), case.y.requires_grad_()
    grad = torch.ones_like(y)
    d_x, d_y = torch.autograd.grad(case.run(), (x, y), grad)
    assert torch.equal(d_y, grad)
    wide = case.x.detach().double().requires_grad_()
    out = reference(wide, case.y.detach().double(), case.sets, case.ids)
    (wanted,) = torch.autograd.grad(out.sum(), wide)
    largest = wanted.abs().max().item()
    torch.testing.assert_close(d_x.double(), wanted, rtol=2 * ONE_ULP[dtype], atol=largest / 256)


def test_ids_that_do_not_come_from_this_batch_write_nothing_beside_it() -> None:
    case = on_a_gpu(3, (64, 64), torch.float32)
    wrong = torch.full_like(case.ids, 10**6)  # written since it was checked
    found = multi_lora(case.x, case.y, case.sets, wrong, segments(wrong, 5, 3))
    assert torch.equal(found, case.y)
