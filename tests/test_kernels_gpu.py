"""The kernels on a GPU, beside their references; left out where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import DoRA, attach
from polyadapt.core.kernels import dora_compose, hadamard
from polyadapt.tests.factor_cases import stir
from polyadapt.tests.kernel_cases import ONE_ULP, assert_close, compose_case, gradient_case

pytestmark = pytest.mark.gpu
SHAPES = [(3, 5), (2, 197, 768), (65, 4097)]

by_dtype = pytest.mark.parametrize("dtype", ONE_ULP, ids=str)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@by_dtype
@by_shape
def test_compose_is_its_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, lora, gain, bias = compose_case(shape, dtype, "cuda")
    for whole, last in ((False, None), (True, bias)):
        found = dora_compose.dora_compose(base, lora, gain, 0.75, last, whole)
        assert_close(found, dora_compose.reference(base, lora, gain, 0.75, last, whole))


@by_dtype
@by_shape
def test_the_gradients_of_compose_are_their_references_and_always_the_same_bits(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    case = [t.requires_grad_() for t in compose_case(shape, dtype, "cuda")]
    grad = gradient_case(shape, dtype, "cuda")

    def gradients() -> tuple[Tensor, ...]:
        base, lora, gain, bias = case
        out = dora_compose.dora_compose(base, lora, gain, 0.75, bias)
        return torch.autograd.grad(out, case, grad)

    found, again = gradients(), gradients()
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    wide = [t.detach().double() for t in case]
    d_base, d_lora, d_gain, columns = dora_compose.reference_backward(
        grad.double(), wide[2], 0.75, False, wide[0], wide[1], wide[3]
    )
    assert_close(found[0], d_base.to(dtype))
    assert_close(found[1], d_lora.to(dtype))
    torch.testing.assert_close(found[2].double(), d_gain, rtol=1e-4, atol=1e-3)
    wanted = ((1 - wide[2]) * columns).to(dtype)
    torch.testing.assert_close(found[3], wanted, rtol=2 * ONE_ULP[dtype], atol=1e-3)


@by_dtype
@pytest.mark.parametrize("size", [16, 384, 768, 1024, 1280, 3072, 14336, 16384])
def test_hadamard_is_its_reference(size: int, dtype: torch.dtype) -> None:
    x = gradient_case((5, size), dtype, "cuda")
    for inverse in (False, True):
        wanted = hadamard.reference(x.double(), inverse)
        torch.testing.assert_close(
            hadamard.hadamard(x, inverse).double(), wanted, rtol=ONE_ULP[dtype], atol=1e-5
        )


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["plain", "dropout"])
def test_dora_on_a_gpu_is_dora_on_a_cpu(dropout: float) -> None:
    model = nn.Sequential(nn.Linear(48, 40))
    stir(attach(model, DoRA(rank=4, dropout=dropout), at="0"))
    x = torch.randn(7, 48)
    wanted = model.eval()(x)
    found = model.cuda()(x.cuda())
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-5)
    model.train()(x.cuda()).sum().backward()
