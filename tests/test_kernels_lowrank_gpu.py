"""`lowrank_linear` and LoRA's slots on a GPU, beside their references; left out without one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import LoRA, attach
from polyadapt.core.kernels.lowrank_linear import lowrank_linear
from polyadapt.core.kernels.lowrank_orders import Call, by_column, up_again
from polyadapt.tests.factor_cases import stir
from polyadapt.tests.kernel_cases import ONE_ULP, gradient_case
from polyadapt.tests.lowrank_cases import SCALE, lowrank_case

pytestmark = pytest.mark.gpu
SIZES = [(768, 2304, 8), (64, 48, 33), (30, 41, 3), (1, 1, 1)]
EXTRAS = [(), ("bias", "weights"), ("base", "weights"), ("bias", "gain"), ("base", "bias", "gain")]

by_dtype = pytest.mark.parametrize("dtype", ONE_ULP, ids=str)
by_sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)


def on_gpu(dtype: torch.dtype, sizes: tuple[int, int, int], extra: tuple[str, ...]) -> Any:
    """The operands of a call on the GPU, those that learn, and the same in fp64."""
    case = lowrank_case(dtype, (2, 197), sizes)
    given = {n: case[n].cuda() for n in ("x", "w0", "a", "b", *extra)}
    leaves = [t.requires_grad_() for n, t in given.items() if n != "w0"]
    wide = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in given.items()}
    return given, leaves, wide


def called(given: dict[str, Tensor], plan: str) -> Tensor:
    """y by an order, with the scale of the cases."""
    return lowrank_linear(**given, scale=SCALE, plan=plan)  # type: ignore[arg-type]


@by_dtype
@by_sizes
@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_the_op_and_its_gradients_are_those_of_fp64(
    extra: tuple[str, ...], sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    given, leaves, wide = on_gpu(dtype, sizes, extra)
    grad = gradient_case((2, 197, sizes[1]), dtype, "cuda")
    found, wanted = called(given, "P1"), called(wide, "P1")
    gradients = torch.autograd.grad(found, leaves, grad, allow_unused=True)
    learning = [t for t in wide.values() if t.requires_grad]
    expected = torch.autograd.grad(wanted, learning, grad.double(), allow_unused=True)
    for mine, exact in zip((found, *gradients), (wanted, *expected), strict=True):
        if exact is not None:
            # v, Z and the products of a library are rounded on the way.
            bound = 8 * max(ONE_ULP[dtype], 1e-5) * float(exact.detach().abs().max())
            torch.testing.assert_close(mine.double(), exact, rtol=0, atol=bound)


@by_dtype
def test_equal_inputs_give_equal_bits(dtype: torch.dtype) -> None:
    given, leaves, _ = on_gpu(dtype, SIZES[0], ("bias", "weights"))

    def results() -> list[Tensor]:
        y = called(given, "P1")
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    assert all(torch.equal(one, again) for one, again in zip(results(), results(), strict=True))


@pytest.mark.parametrize("rank", [3, 16, 32])
def test_the_pass_over_the_gradient_is_two_products(rank: int) -> None:
    from polyadapt.core.kernels import lowrank_linear_triton

    case = lowrank_case(torch.bfloat16, (5000,), (64, 700, rank))
    x, w0, a, b = (case[n].cuda() for n in ("x", "w0", "a", "b"))
    call = Call(x, w0, a, b, SCALE)
    grad, v = gradient_case((5000, 700), torch.bfloat16, "cuda"), call.down()
    z, d_b = lowrank_linear_triton.backward(call, grad, v)
    wide = replace(call, x=call.x.double(), b=call.b.double())
    for found, wanted in (
        (z, up_again(wide, grad.double())),
        (d_b, by_column(wide, grad.double(), v.double())),
    ):
        bound = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["plain", "dropout"])
def test_lora_on_a_gpu_is_lora_on_a_cpu(dropout: float) -> None:
    model = nn.Sequential(nn.Linear(48, 40))
    stir(attach(model, LoRA(rank=4, dropout=dropout), at="0"))
    x = torch.randn(7, 48)
    wanted = model.eval()(x)
    found = model.cuda()(x.cuda())
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-5)
    model.train()(x.cuda()).sum().backward()
