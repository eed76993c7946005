"""LoRA: the update, its start, its dtypes, dropout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from polyadapt.core import LoRA, activate, attach, select
from polyadapt.core.adapters.lora import LoRAAdapter, Pair
from polyadapt.tests.factor_cases import layers, lora_at, site_at, stir


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 15)


def test_the_update_is_scale_times_b_times_a() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    adapter = LoRAAdapter(Pair(a, b, 2.0, 0.0, False))
    assert adapter.weight(torch.ones(2, 2)).tolist() == [[7.0, 13.0], [9.0, 17.0]]
    layer = nn.Linear(2, 2)
    x = torch.tensor([[1.0, -1.0]])  # A x = -1, s B A x = [-6, -8]
    _, frozen = site_at(nn.Sequential(layer), "0")
    assert adapter.output(x, torch.zeros(1, 2), frozen).tolist() == [[-6.0, -8.0]]
    factors = adapter.factors()
    assert factors[0] is adapter.A
    assert factors[1] is adapter.B
    assert factors[2:] == (None, 2.0)


@pytest.mark.parametrize(("model", "x"), layers())
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_new_adapter_changes_no_bit(model: nn.Module, x: Tensor, init: Any) -> None:
    adapter, layer = lora_at(model, LoRA(rank=2, init=init))
    y = model(x)
    assert torch.equal(adapter.output(x, y, layer), y)
    assert torch.equal(adapter.weight(layer.matrix()), layer.matrix())


@pytest.mark.parametrize(("model", "x"), layers())
def test_weight_and_output_agree(model: nn.Module, x: Tensor) -> None:
    adapter, layer = lora_at(model, LoRA(rank=2, alpha=3))
    stir(adapter)
    moved = adapter.output(x, model(x), layer)
    with torch.no_grad():
        layer.stored.copy_(layer.as_stored(adapter.weight(layer.matrix()), layer.stored))
    torch.testing.assert_close(moved, model(x))
    assert not torch.equal(moved, adapter.output(x, model(x), layer))


@pytest.mark.parametrize("part", ["q", "v"])
def test_a_part_of_a_fused_projection_has_its_own_pair(part: str) -> None:
    model = Fused()
    site, layer = site_at(model, f"qkv[{part}]")
    adapter = LoRA(rank=2).build(site, layer.matrix().detach(), None)
    assert isinstance(adapter, LoRAAdapter)
    assert (adapter.A.shape, adapter.B.shape) == ((2, 6), (5, 2))
    stir(adapter)
    x = torch.randn(4, 6)
    assert site.rows is not None
    y = model.qkv(x)[:, slice(*site.rows)]
    merged = adapter.weight(layer.matrix())
    torch.testing.assert_close(
        adapter.output(x, y, layer), F.linear(x, merged, model.qkv.bias[slice(*site.rows)])
    )


@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    lead=st.lists(st.integers(0, 3), max_size=3),
    share=st.floats(0, 1),
)
@settings(max_examples=40, deadline=None)
def test_weight_and_output_agree_for_any_shape(
    d_out: int, d_in: int, lead: list[int], share: float
) -> None:
    rank = 1 + int(share * (min(d_out, d_in) - 1))
    model = nn.Sequential(nn.Linear(d_in, d_out))
    adapter, layer = lora_at(model, LoRA(rank=rank))
    stir(adapter)
    x = torch.randn(*lead, d_in)
    expected = F.linear(x, adapter.weight(layer.matrix()), layer.bias)
    torch.testing.assert_close(adapter.output(x, model(x), layer), expected)


@pytest.mark.parametrize(("model", "x"), layers())
def test_merging_gives_the_same_output(model: nn.Module, x: Tensor) -> None:
    lora = attach(model, LoRA(rank=2), at="0")
    stir(lora)
    with activate(model, None):
        untouched = model(x)
    adapted = model(x)
    lora.merge()
    torch.testing.assert_close(model(x), adapted)
    lora.detach()
    assert torch.equal(model(x), untouched)
    assert not torch.allclose(adapted, untouched)


def test_gradients_are_those_of_the_formula() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter, layer = lora_at(model, LoRA(rank=2, alpha=6))
    stir(adapter)
    w = layer.matrix().detach().requires_grad_()
    x, towards = torch.randn(4, 6), torch.randn(4, 5)
    adapter.output(x, model(x).detach(), layer).backward(towards)
    g = towards.t() @ x  # dL/dW
    torch.testing.assert_close(adapter.A.grad, 3 * adapter.B.detach().t() @ g)
    torch.testing.assert_close(adapter.B.grad, 3 * g @ adapter.A.detach().t())
    adapter.zero_grad()
    adapter.weight(w).backward(g)
    torch.testing.assert_close(adapter.B.grad, 3 * g @ adapter.A.detach().t())
    torch.testing.assert_close(w.grad, g)


def test_the_kaiming_start_is_uniform_within_one_over_the_root_of_d_in() -> None:
    adapter, _ = lora_at(nn.Sequential(nn.Linear(768, 64)), LoRA(rank=64))
    bound = 0.036084  # 1 / sqrt(768)
    assert adapter.A.abs().max() <= bound
    assert adapter.A.abs().max() > 0.99 * bound
    assert adapter.A.std().item() == pytest.approx(0.020833, rel=0.01)  # 1 / sqrt(3 * 768)
    assert adapter.B.count_nonzero() == 0


@pytest.mark.parametrize(("given_std", "std"), [(None, 1 / math.sqrt(768)), (0.5, 0.5)])
def test_the_gaussian_start_has_the_declared_deviation(given_std: float | None, std: float) -> None:
    recipe = LoRA(rank=64, init="gaussian", init_std=given_std)
    adapter, _ = lora_at(nn.Sequential(nn.Linear(768, 64)), recipe)
    assert adapter.A.std().item() == pytest.approx(std, rel=0.01)
    assert adapter.A.abs().max() > 3 * std
    assert adapter.B.count_nonzero() == 0


def test_at_embeddings_the_roles_of_the_factors_swap() -> None:
    adapter, _ = lora_at(nn.Sequential(nn.Embedding(70, 600)), LoRA(rank=8))
    assert (adapter.A.shape, adapter.B.shape) == ((8, 70), (600, 8))
    assert adapter.A.count_nonzero() == 0
    assert adapter.B.std().item() == pytest.approx(1.0, rel=0.05)


def test_a_generator_makes_the_start_repeatable() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    first, second = (lora_at(model, LoRA(rank=2))[0].A for _ in range(2))
    site, layer = site_at(model, "0")
    other = LoRA(rank=2).build(site, layer.matrix(), torch.Generator().manual_seed(1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other.get_parameter("A"))


def test_factors_are_fp32_whatever_the_default_dtype() -> None:
    model = nn.Sequential(nn.Linear(6, 5, dtype=torch.bfloat16))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        adapter, _ = lora_at(model, LoRA(rank=2))
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_keep_theirs_and_stay_close(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter, layer = lora_at(model, LoRA(rank=2))
    stir(adapter)
    x = torch.randn(4, 6)
    exact = F.linear(x, adapter.weight(layer.matrix()), layer.bias)
    model.to(dtype)
    moved = adapter.output(x.to(dtype), model(x.to(dtype)), layer)
    assert moved.dtype == adapter.weight(layer.matrix()).dtype == dtype
    bound = 6 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6  # factors are fp32
    torch.testing.assert_close(moved.float(), exact, rtol=bound, atol=bound)
    moved.sum().backward()
    assert adapter.A.grad is not None
    assert adapter.A.grad.dtype == torch.float32


def test_low_precision_weights_are_added_in_fp32() -> None:
    adapter = LoRAAdapter(Pair(torch.tensor([[1 + 2**-9]]), torch.ones(1, 1), 1.0, 0.0, False))
    w = torch.tensor([[-1.0]], dtype=torch.bfloat16)
    assert adapter.weight(w).item() == 2**-9  # in bf16, A would be 1


def test_autocast_computes_the_branch_in_its_dtype_and_the_weight_exactly() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter, layer = lora_at(model, LoRA(rank=2))
    stir(adapter)
    x = torch.randn(4, 6)
    exact, weight = adapter.output(x, model(x), layer), adapter.weight(layer.matrix())
    with torch.autocast("cpu", torch.bfloat16):
        moved = adapter.output(x, model(x), layer)
        assert torch.equal(adapter.weight(layer.matrix()), weight)
    assert moved.dtype == torch.bfloat16
    torch.testing.assert_close(moved.float(), exact, rtol=0.03, atol=0.03)


def test_dropout_acts_on_the_branch_alone_and_in_training_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter, layer = lora_at(model, LoRA(rank=2, dropout=0.5))
    x = torch.randn(8, 6)
    y = model(x)
    assert torch.equal(adapter.output(x, y, layer), y)  # B = 0: nothing of y is dropped
    stir(adapter)
    torch.manual_seed(3)
    moved = adapter.output(x, y, layer)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    torch.testing.assert_close(moved, y + dropped @ adapter.A.t() @ adapter.B.t())
    adapter.eval()
    torch.testing.assert_close(adapter.output(x, y, layer), y + x @ adapter.A.t() @ adapter.B.t())


def test_row_numbers_are_not_dropped() -> None:
    model = nn.Sequential(nn.Embedding(7, 5))
    adapter, layer = lora_at(model, LoRA(rank=2, dropout=0.5))
    stir(adapter)
    x = torch.arange(7)
    expected = F.embedding(x, adapter.weight(layer.matrix()).t())
    torch.testing.assert_close(adapter.output(x, model(x), layer), expected)


@pytest.mark.parametrize("slot", ["output", "weight"])
def test_compiling_gives_one_graph_and_the_same_values(slot: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    stir(attach(model, LoRA(rank=2), at=select(model, "0", slot)))
    x = torch.randn(4, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
