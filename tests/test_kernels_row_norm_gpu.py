"""`row_norm` on a GPU, beside its reference; left out where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polyadapt.core import DoRA
from polyadapt.core.kernels.dispatch import runs_kernel
from polyadapt.core.kernels.row_norm import Method, exact, row_norm
from polyadapt.tests.factor_cases import dora_at, stir
from polyadapt.tests.kernel_cases import ONE_ULP, norm_case

pytestmark = pytest.mark.gpu
CASES = [((3, 5), 2), ((33, 513), 17), ((768, 3072), 8), ((2048, 512), 384), ((1, 1), 1)]

by_dtype = pytest.mark.parametrize("dtype", ONE_ULP, ids=str)


@by_dtype
@pytest.mark.parametrize(("shape", "rank"), CASES, ids=str)
def test_the_norm_is_its_reference_in_double_precision_and_always_the_same_bits(
    shape: tuple[int, int], rank: int, dtype: torch.dtype
) -> None:
    for factors in (dtype, torch.float32):
        w0, a, b = norm_case(shape, rank, dtype, factors, "cuda")
        assert runs_kernel(w0)
        wanted = exact(w0.double(), a, b, 0.75).float()
        methods: list[Method] = ["exact", "factored", "auto"]
        for method in methods:
            found = row_norm(w0, a, b, 0.75, method)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
        assert torch.equal(row_norm(w0, a, b, 0.75), row_norm(w0, a, b, 0.75))
        transposed = w0.t().contiguous().t()  # read where it lies, added up in another order
        torch.testing.assert_close(row_norm(transposed, a, b, 0.75), wanted, rtol=1e-4, atol=0)


def test_no_update_has_the_bits_of_another_scale() -> None:
    w0, a, b = norm_case((200, 700), 16, torch.bfloat16, torch.float32, "cuda")
    without = row_norm(w0, a, torch.zeros_like(b), 2.0)
    assert torch.equal(without, row_norm(w0, a, b, 0.0))


@by_dtype
def test_a_new_dora_on_a_gpu_changes_no_bit_and_a_trained_one_has_the_cpus_norm(
    dtype: torch.dtype,
) -> None:
    model = nn.Sequential(nn.Linear(301, 200)).to("cuda", dtype)
    adapter, layer = dora_at(model, DoRA(rank=4))
    adapter.cuda()
    x = torch.randn(3, 301).to("cuda", dtype)
    assert torch.equal(adapter.output(x, model(x), layer), model(x))
    stir(adapter.cpu())
    wanted = exact(layer.matrix().cpu(), adapter.A, adapter.B, adapter.scale)
    found = adapter.cuda().norm(layer)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=0)
