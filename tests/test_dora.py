"""DoRA: the function, in its weight form and its output form, and in a backbone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from polyadapt.core import AdaptError, DoRA, LoRA, activate, attach, select
from polyadapt.core.adapters.dora import row_norm
from polyadapt.core.sites import Site
from polyadapt.tests.factor_cases import dora_at, layers, stir


@pytest.mark.parametrize(("model", "x"), layers())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_new_adapter_changes_no_bit(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    model = copy.deepcopy(model).to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    for dropout in (0.0, 0.5):
        adapter, layer = dora_at(model, DoRA(rank=2, dropout=dropout))
        y = model(x)
        assert torch.equal(adapter.output(x, y, layer), y)
        assert torch.equal(adapter.weight(layer.matrix()), layer.matrix())


@pytest.mark.parametrize(("model", "x"), layers())
def test_weight_and_output_agree(model: nn.Module, x: Tensor) -> None:
    model = copy.deepcopy(model)
    adapter, layer = dora_at(model, DoRA(rank=2, alpha=3))
    stir(adapter)
    moved = adapter.output(x, model(x), layer)
    before = model(x)
    with torch.no_grad():
        layer.stored.copy_(layer.as_stored(adapter.weight(layer.matrix()), layer.stored))
    torch.testing.assert_close(moved, model(x))
    assert not torch.allclose(moved, before)


def test_the_output_is_that_of_the_merged_weight_in_double_precision() -> None:
    model = nn.Sequential(nn.Linear(6, 5).double())
    adapter, layer = dora_at(model)
    stir(adapter)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = F.linear(x, adapter.weight(layer.matrix()), layer.bias)
    torch.testing.assert_close(adapter.output(x, model(x), layer), expected, rtol=0, atol=1e-12)


@given(d_out=st.integers(1, 9), d_in=st.integers(1, 9), share=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_weight_and_output_agree_for_any_shape(d_out: int, d_in: int, share: float) -> None:
    model = nn.Sequential(nn.Linear(d_in, d_out))
    rank = 1 + int(share * (min(d_out, d_in) - 1))
    adapter, layer = dora_at(model, DoRA(rank=rank))
    with torch.no_grad():
        adapter.B.normal_(std=0.1)
        adapter.m.mul_(1.5)
    x = torch.randn(3, d_in)
    expected = F.linear(x, adapter.weight(layer.matrix()), layer.bias)
    torch.testing.assert_close(adapter.output(x, model(x), layer), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model", "x"), layers())
def test_merging_gives_the_same_output_and_detaching_the_old_one(
    model: nn.Module, x: Tensor
) -> None:
    adapters = attach(model, DoRA(rank=2), at="0")
    with activate(model, None):
        untouched = model(x)
    stir(adapters)
    adapted = model(x)
    adapters.merge()
    torch.testing.assert_close(model(x), adapted)
    adapters.detach()
    assert torch.equal(model(x), untouched)
    assert not torch.allclose(adapted, untouched)


def test_the_rows_of_the_adapted_weight_have_the_trained_magnitudes() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter, layer = dora_at(model)
    torch.testing.assert_close(adapter.m.data, layer.matrix().norm(dim=1))
    stir(adapter, 1.0)
    norms = adapter.weight(layer.matrix()).norm(dim=1)
    torch.testing.assert_close(norms, adapter.m.abs())


def test_the_magnitude_of_an_embedding_runs_over_the_vocabulary() -> None:
    model = nn.Sequential(nn.Embedding(7, 5))
    adapter, layer = dora_at(model)
    assert adapter.m.shape == (5,)
    torch.testing.assert_close(adapter.m.data, layer.stored.norm(dim=0))


def test_doubling_the_magnitude_doubles_the_output_but_not_the_bias() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter, layer = dora_at(model)
    with torch.no_grad():
        adapter.m.mul_(2)
    x = torch.randn(3, 6)
    expected = F.linear(x, 2 * layer.matrix(), layer.bias)
    torch.testing.assert_close(adapter.output(x, model(x), layer), expected)


def test_a_gain_near_one_is_not_lost_in_bf16() -> None:
    linear = nn.Linear(1, 1, dtype=torch.bfloat16)
    nn.init.constant_(linear.weight, 1)
    nn.init.constant_(linear.bias, -1)
    model = nn.Sequential(linear)
    adapter, layer = dora_at(model, DoRA(rank=1))
    with torch.no_grad():
        adapter.m.fill_(1 + 2**-10)  # in bf16 this would be 1
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    assert adapter.output(x, model(x), layer).item() == 2**-10


def test_a_gain_of_zero_leaves_the_bias_in_bf16() -> None:
    linear = nn.Linear(1, 1, dtype=torch.bfloat16)
    nn.init.constant_(linear.weight, 1)
    nn.init.constant_(linear.bias, 2**-9)
    model = nn.Sequential(linear)
    adapter, layer = dora_at(model, DoRA(rank=1))
    nn.init.zeros_(adapter.m)
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    assert adapter.output(x, model(x), layer).item() == 2**-9  # in bf16, y - b = 1 = y


def test_autocast_stays_close_and_leaves_the_weight_exact() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter, layer = dora_at(model)
    stir(adapter)
    x = torch.randn(4, 6)
    exact, weight = adapter.output(x, model(x), layer), adapter.weight(layer.matrix())
    with torch.autocast("cpu", torch.bfloat16):
        moved = adapter.output(x, model(x), layer)
        assert torch.equal(adapter.weight(layer.matrix()), weight)
        moved.float().sum().backward()
    assert moved.dtype == torch.bfloat16
    torch.testing.assert_close(moved.float(), exact, rtol=0.03, atol=0.03)
    assert {p.grad.dtype for p in adapter.parameters() if p.grad is not None} == {torch.float32}


def test_dropout_reaches_the_branch_and_the_change_of_magnitude() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter, layer = dora_at(model, DoRA(rank=2, dropout=0.5))
    stir(adapter)
    x = torch.randn(8, 6)
    torch.manual_seed(3)
    moved = adapter.output(x, model(x), layer)
    torch.manual_seed(3)
    dropped, w0 = F.dropout(x, 0.5), layer.matrix()
    gain = adapter.m / row_norm(w0, adapter.A, adapter.B, adapter.scale)
    branch = dropped @ adapter.A.t() @ adapter.B.t()
    expected = model(x) + (gain - 1) * (dropped @ w0.t()) + gain * branch
    torch.testing.assert_close(moved, expected)
    adapter.eval()
    expected = F.linear(x, adapter.weight(w0), layer.bias)
    torch.testing.assert_close(adapter.output(x, model(x), layer), expected)


def test_the_input_of_a_convolution_is_dropped_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    adapter, layer = dora_at(model, DoRA(rank=2, dropout=0.5))
    stir(adapter)
    x = torch.randn(2, 3, 6, 6)
    torch.manual_seed(3)
    moved = adapter.output(x, model(x), layer)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    change = adapter.weight(layer.matrix()) - layer.matrix()
    torch.testing.assert_close(moved, model(x) + F.conv2d(dropped, change.view(5, 3, 3, 3)))


def test_counts_are_those_of_the_card() -> None:
    shapes = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
    total = 0
    for shape in shapes:
        site = Site("layer", "weight", None, None, "linear", shape, "output", "")
        adapter = DoRA(rank=8).build(site, torch.zeros(1).expand(shape), None)
        total += sum(p.numel() for p in adapter.parameters())
    assert 12 * total == 1_262_592


def test_parts_of_a_fused_projection_have_their_own_magnitudes() -> None:
    model = nn.Sequential()
    model.add_module("qkv", nn.Linear(6, 15))
    adapters = attach(model, DoRA(rank=2), at="qkv[q,v]")
    stir(adapters)
    x = torch.randn(3, 6)
    with activate(model, None):
        untouched = model(x)
    moved = model(x)
    assert torch.equal(moved[:, 5:10], untouched[:, 5:10])
    adapters.merge()
    torch.testing.assert_close(model(x), moved)


def test_it_acts_where_the_weight_is_read() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.Sequential(attention)
    adapters = attach(model, DoRA(rank=2), at="0.in_proj_weight[q]")
    x = torch.randn(2, 3, 8)
    with torch.no_grad():  # attention takes other kernels where a gradient is wanted
        with activate(model, None):
            untouched = attention(x, x, x)[0]
        assert torch.equal(attention(x, x, x)[0], untouched)
        stir(adapters)
        assert not torch.allclose(attention(x, x, x)[0], untouched)


def test_no_other_set_may_act_before_it() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    attach(model, LoRA(rank=2), at="0", name="lora")
    attach(model, DoRA(rank=2), at="0", name="dora")
    with activate(model, ["dora", "lora"]):
        model(torch.randn(2, 6))
    with (
        pytest.raises(AdaptError, match="reads the frozen weight of 0"),
        activate(model, ["lora", "dora"]),
    ):
        pass


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("slot", ["output", "weight"])
def test_compiling_gives_one_graph_and_the_same_values(slot: Any, training: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapters = attach(model, DoRA(rank=2), at=select(model, "0", slot))
    stir(adapters)
    adapters.requires_grad_(training)
    x = torch.randn(4, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    if training:
        compiled(x).square().sum().backward()
        ours = [p.grad for p in adapters.parameters()]
        adapters.zero_grad()
        model(x).square().sum().backward()
        for one, parameter in zip(ours, adapters.parameters(), strict=True):
            torch.testing.assert_close(one, parameter.grad)
