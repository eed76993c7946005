"""LoRA, rsLoRA and LoRA+: the mathematics, the settings, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from polyadapt.core import AdaptError, LoRA, Recipe, activate, attach, select
from polyadapt.core.adapters.lora import LoRAAdapter, Pair
from polyadapt.core.kinds import layer_at
from polyadapt.core.layers import FrozenLayer
from polyadapt.core.sites import Site


class Conv1D(nn.Module):
    """A layer that stores its weight as GPT-2's does, [d_in, d_out]."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.nf = d_out
        self.weight = nn.Parameter(torch.randn(d_in, d_out) / d_in**0.5)
        self.bias = nn.Parameter(torch.randn(d_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], self.nf)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 15)


def cases() -> list[Any]:
    """(layer kind, backbone, pattern, input, output of the adapted rows -> of the whole)."""
    torch.manual_seed(1)
    numbers = torch.tensor([[0, 3, 4], [4, 1, 0]])
    return [
        pytest.param(nn.Sequential(nn.Linear(6, 5)), "0", torch.randn(2, 3, 6), id="linear"),
        pytest.param(nn.Sequential(nn.Linear(6, 5, bias=False)), "0", torch.randn(6), id="no bias"),
        pytest.param(nn.Sequential(Conv1D(5, 6)), "0", torch.randn(2, 3, 6), id="transposed"),
        pytest.param(
            nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode="reflect")),
            "0",
            torch.randn(2, 3, 7, 8),
            id="conv2d",
        ),
        pytest.param(
            nn.Sequential(nn.Conv1d(3, 5, 3, dilation=2)), "0", torch.randn(2, 3, 9), id="conv1d"
        ),
        pytest.param(nn.Sequential(nn.Embedding(7, 5)), "0", numbers, id="embedding"),
    ]


def site_of(model: nn.Module, pattern: str, slot: Any = None) -> tuple[Site, FrozenLayer]:
    site = select(model, pattern, slot)[0]
    return site, layer_at(model, site)


def adapter_at(model: nn.Module, pattern: str, recipe: LoRA) -> tuple[LoRAAdapter, FrozenLayer]:
    site, layer = site_of(model, pattern)
    adapter = recipe.build(site, layer.matrix().detach(), torch.Generator().manual_seed(0))
    assert isinstance(adapter, LoRAAdapter)
    return adapter, layer


def stir(adapter: nn.Module, scale: float = 0.3) -> None:
    """Move every trained tensor away from its start."""
    with torch.no_grad():
        for n, parameter in enumerate(adapter.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n))
            parameter += scale * noise


def test_the_update_is_scale_times_b_times_a() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    adapter = LoRAAdapter(Pair(a, b, 2.0, 0.0, False))
    assert adapter.weight(torch.ones(2, 2)).tolist() == [[7.0, 13.0], [9.0, 17.0]]
    layer = nn.Linear(2, 2)
    x = torch.tensor([[1.0, -1.0]])  # A x = -1, s B A x = [-6, -8]
    _, frozen = site_of(nn.Sequential(layer), "0")
    assert adapter.output(x, torch.zeros(1, 2), frozen).tolist() == [[-6.0, -8.0]]
    factors = adapter.factors()
    assert factors[0] is adapter.A
    assert factors[1] is adapter.B
    assert factors[2:] == (None, 2.0)


@pytest.mark.parametrize(("model", "pattern", "x"), cases())
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_new_adapter_changes_no_bit(model: nn.Module, pattern: str, x: Tensor, init: Any) -> None:
    adapter, layer = adapter_at(model, pattern, LoRA(rank=2, init=init))
    y = model(x)
    assert torch.equal(adapter.output(x, y, layer), y)
    assert torch.equal(adapter.weight(layer.matrix()), layer.matrix())


@pytest.mark.parametrize(("model", "pattern", "x"), cases())
def test_weight_and_output_agree(model: nn.Module, pattern: str, x: Tensor) -> None:
    adapter, layer = adapter_at(model, pattern, LoRA(rank=2, alpha=3))
    stir(adapter)
    moved = adapter.output(x, model(x), layer)
    with torch.no_grad():
        layer.stored.copy_(layer.as_stored(adapter.weight(layer.matrix()), layer.stored))
    torch.testing.assert_close(moved, model(x))
    assert not torch.equal(moved, adapter.output(x, model(x), layer))


@pytest.mark.parametrize("part", ["q", "v"])
def test_a_part_of_a_fused_projection_has_its_own_pair(part: str) -> None:
    model = Fused()
    site, layer = site_of(model, f"qkv[{part}]")
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
    adapter, layer = adapter_at(model, "0", LoRA(rank=rank))
    stir(adapter)
    x = torch.randn(*lead, d_in)
    expected = F.linear(x, adapter.weight(layer.matrix()), model[0].bias)  # type: ignore[arg-type]
    torch.testing.assert_close(adapter.output(x, model(x), layer), expected)


@pytest.mark.parametrize(("model", "pattern", "x"), cases())
def test_merging_gives_the_same_output(model: nn.Module, pattern: str, x: Tensor) -> None:
    lora = attach(model, LoRA(rank=2), at=pattern)
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
    adapter, layer = adapter_at(model, "0", LoRA(rank=2, alpha=6))
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


@pytest.mark.parametrize(
    ("recipe", "scale"),
    [
        (LoRA(rank=16, alpha=16), 1.0),
        (LoRA(rank=16, alpha=16, scaling="rank_stabilised"), 4.0),
        (LoRA(rank=4, alpha=16), 4.0),
        (LoRA(rank=4), 1.0),
        (LoRA(rank=4, scaling="rank_stabilised"), 2.0),
        (LoRA(rank=4, ranks={"0": 8}), 0.5),
    ],
)
def test_the_scale_follows_the_rule(recipe: LoRA, scale: float) -> None:
    adapter, _ = adapter_at(nn.Sequential(nn.Linear(16, 16)), "0", recipe)
    assert adapter.scale == scale


def test_alpha_is_saved_as_the_number_that_acts() -> None:
    recipe = LoRA(rank=4)
    assert recipe.alpha == 4.0
    assert recipe == LoRA(rank=4, alpha=4)
    assert recipe.replace(rank=8).alpha == 4.0
    text = json.dumps(LoRA(rank=4, ranks={"a.*": 2}, dropout=0.1).to_json())
    assert json.loads(text)["alpha"] == 4.0
    assert Recipe.from_json(json.loads(text)) == LoRA(rank=4, ranks={"a.*": 2}, dropout=0.1)
    assert hash(LoRA(ranks={"a": 1})) == hash(LoRA(ranks={"b": 1}))


def test_the_kaiming_start_is_uniform_within_one_over_the_root_of_d_in() -> None:
    adapter, _ = adapter_at(nn.Sequential(nn.Linear(768, 64)), "0", LoRA(rank=64))
    bound = 0.036084  # 1 / sqrt(768)
    assert adapter.A.abs().max() <= bound
    assert adapter.A.abs().max() > 0.99 * bound
    assert adapter.A.std().item() == pytest.approx(0.020833, rel=0.01)  # 1 / sqrt(3 * 768)
    assert adapter.B.count_nonzero() == 0


@pytest.mark.parametrize(("given_std", "std"), [(None, 1 / math.sqrt(768)), (0.5, 0.5)])
def test_the_gaussian_start_has_the_declared_deviation(given_std: float | None, std: float) -> None:
    recipe = LoRA(rank=64, init="gaussian", init_std=given_std)
    adapter, _ = adapter_at(nn.Sequential(nn.Linear(768, 64)), "0", recipe)
    assert adapter.A.std().item() == pytest.approx(std, rel=0.01)
    assert adapter.A.abs().max() > 3 * std
    assert adapter.B.count_nonzero() == 0


def test_at_embeddings_the_roles_of_the_factors_swap() -> None:
    adapter, _ = adapter_at(nn.Sequential(nn.Embedding(70, 600)), "0", LoRA(rank=8))
    assert (adapter.A.shape, adapter.B.shape) == ((8, 70), (600, 8))
    assert adapter.A.count_nonzero() == 0
    assert adapter.B.std().item() == pytest.approx(1.0, rel=0.05)


def test_a_generator_makes_the_start_repeatable() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    first, second = (adapter_at(model, "0", LoRA(rank=2))[0].A for _ in range(2))
    site, layer = site_of(model, "0")
    other = LoRA(rank=2).build(site, layer.matrix(), torch.Generator().manual_seed(1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other.get_parameter("A"))


def test_factors_are_fp32_whatever_the_default_dtype() -> None:
    model = nn.Sequential(nn.Linear(6, 5, dtype=torch.bfloat16))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        adapter, _ = adapter_at(model, "0", LoRA(rank=2))
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_keep_theirs_and_stay_close(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter, layer = adapter_at(model, "0", LoRA(rank=2))
    stir(adapter)
    x = torch.randn(4, 6)
    exact = F.linear(x, adapter.weight(layer.matrix()), model[0].bias)  # type: ignore[arg-type]
    model.to(dtype)
    moved = adapter.output(x.to(dtype), model(x.to(dtype)), layer)
    assert moved.dtype == adapter.weight(layer.matrix()).dtype == dtype
    bound = 6 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6  # factors are fp32
    torch.testing.assert_close(moved.float(), exact, rtol=bound, atol=bound)
    moved.sum().backward()
    assert adapter.A.grad is not None
    assert adapter.A.grad.dtype == torch.float32


def test_low_precision_weights_are_added_in_fp32() -> None:
    a, b = torch.tensor([[1.0], [2**-9]]), torch.ones(1, 2)
    adapter = LoRAAdapter(Pair(a, b, 1.0, 0.0, False))
    w = torch.tensor([[-1.0]], dtype=torch.bfloat16)
    assert adapter.weight(w).item() == 2**-9  # in bf16, B A = 1 + 2^-9 would already be 1


def test_autocast_computes_the_branch_in_its_dtype_and_the_weight_exactly() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter, layer = adapter_at(model, "0", LoRA(rank=2))
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
    adapter, layer = adapter_at(model, "0", LoRA(rank=2, dropout=0.5))
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
    adapter, layer = adapter_at(model, "0", LoRA(rank=2, dropout=0.5))
    stir(adapter)
    x = torch.arange(7)
    expected = F.embedding(x, adapter.weight(layer.matrix()).t())
    torch.testing.assert_close(adapter.output(x, model(x), layer), expected)


def test_ranks_set_the_rank_of_the_sites_they_fit() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    lora = attach(model, LoRA(rank=2, ranks={"{0,1}": 4}), at="*")
    ranks = {name: adapter.get_parameter("A").shape[0] for name, adapter in lora.adapters.items()}
    assert ranks == {"0": 4, "1": 4, "2": 2}
    assert lora.trainable_count() == (4 + 4 + 2) * 16


def test_ranks_know_the_parts_of_fused_projections() -> None:
    lora = attach(Fused(), LoRA(rank=1, ranks={"qkv[v]": 3}), at="qkv[q,v]")
    shapes = {name: adapter.get_parameter("A").shape for name, adapter in lora.adapters.items()}
    assert shapes == {"qkv[q]": (1, 6), "qkv[v]": (3, 6)}


def test_a_rank_for_no_site_is_refused_by_name() -> None:
    sites = select(nn.Sequential(nn.Linear(8, 8)), "0")
    LoRA(ranks={"0": 4}).check(sites)
    with pytest.raises(AdaptError, match=r"ranks has 'blocks\.\*', which fits none of the 1 sites"):
        LoRA(ranks={"blocks.*": 4}).check(sites)


def test_ranks_that_disagree_are_refused() -> None:
    with pytest.raises(AdaptError, match=r"ranks gives 0 different ranks: '0' and '\*'"):
        attach(nn.Sequential(nn.Linear(8, 8)), LoRA(ranks={"0": 4, "*": 2}), at="0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank 0 is not allowed"),
        ({"rank": 2.0}, "rank 2.0 is not allowed"),
        ({"rank": True}, "rank True is not allowed"),
        ({"alpha": 0}, "alpha=0 is not allowed"),
        ({"alpha": math.nan}, "alpha=nan is not allowed"),
        ({"alpha": "8"}, "alpha='8' is not allowed"),
        ({"scaling": "rslora"}, "scaling='rslora' is not allowed: standard or rank_stabilised"),
        ({"init": "zeros"}, "init='zeros' is not allowed: kaiming or gaussian"),
        ({"init_std": 0.1}, "init_std=0.1 is not allowed"),
        ({"init": "gaussian", "init_std": 0.0}, "init_std=0.0 is not allowed"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout=-0.1 is not in"),
        ({"lr_ratio": 0}, "lr_ratio=0 is not allowed"),
        ({"embedding_lr": 0.0}, "embedding_lr=0.0 is not allowed"),
        ({"ranks": {"0": 0}}, "rank 0 is not allowed"),
        ({"ranks": {"a{b": 2}}, "braces must be closed"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdaptError, match=message) as error:
        LoRA(**changes)
    assert "\n" not in str(error.value)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.position = nn.Parameter(torch.zeros(1, 3, 8))
        self.attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("norm.bias", r"norm.bias is of shape \[8\]: a low-rank update needs a weight matrix"),
        ("position", r"position is of shape \[1, 3, 8\]"),
        ("attention", "attention is a whole module: a low-rank update needs"),
    ],
)
def test_sites_without_a_matrix_are_refused_by_name(pattern: str, message: str) -> None:
    with pytest.raises(AdaptError, match=message):
        attach(Holder(), LoRA(rank=2), at=pattern)


def test_a_rank_that_does_not_fit_is_refused_by_name() -> None:
    message = r"rank 6 does not fit 0: its weight is \[5, 6\], so at most 5"
    with pytest.raises(AdaptError, match=message):
        attach(nn.Sequential(nn.Linear(6, 5)), LoRA(rank=6), at="0")


def test_dropout_is_refused_where_the_weight_is_read() -> None:
    with pytest.raises(
        AdaptError, match=r"dropout=0.1 cannot act on attention.in_proj_weight\[q\]"
    ):
        attach(Holder(), LoRA(rank=2, dropout=0.1), at="attention.in_proj_weight[q]")


def vit_b_block() -> Iterator[tuple[Site, Tensor]]:
    """The four linear layers of a block of ViT-B/16."""
    shapes = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
    for path, shape in shapes.items():
        site = Site(path, "weight", None, None, "linear", shape, "output", "")
        yield site, torch.zeros(1).expand(shape)


def test_counts_are_those_of_the_card() -> None:
    built = [LoRA(rank=8).build(site, w, None) for site, w in vit_b_block()]
    assert 12 * sum(p.numel() for adapter in built for p in adapter.parameters()) == 1_179_648
    conv = attach(nn.Sequential(nn.Conv2d(3, 5, 3)), LoRA(rank=2), at="0")
    assert conv.trainable_count() == conv.stored_count() == 2 * (3 * 9 + 5)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.embed(x))
        return y


def rates(groups: list[dict[str, Any]], adapters: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """site/tensor -> (learning rate, weight decay)."""
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups)
    return {
        f"{site}/{name}": found[id(p)]
        for site, adapter in adapters.items()
        for name, p in adapter.named_parameters()
    }


def test_lora_plus_gives_b_its_own_rate_and_embeddings_theirs() -> None:
    lora = attach(Stack(), LoRA(rank=2, lr_ratio=16), at=["embed", "fc"])
    groups = lora.parameter_groups(lr=1e-4, weight_decay=0.1)
    assert rates(groups, lora.adapters) == {
        "embed/A": (1e-6, 0.1),
        "embed/B": (1e-6, 0.1),
        "fc/A": (1e-4, 0.1),
        "fc/B": (pytest.approx(1.6e-3), 0.1),
    }


def test_without_a_ratio_all_factors_learn_alike() -> None:
    lora = attach(Stack(), LoRA(rank=2), at=["embed", "fc"])
    groups = lora.parameter_groups(lr=1e-4, weight_decay=0.1)
    assert set(rates(groups, lora.adapters).values()) == {(1e-4, 0.1)}


def test_tensors_that_do_not_train_are_in_no_group() -> None:
    lora = attach(Stack(), LoRA(rank=2, lr_ratio=16), at="fc")
    lora.adapters["fc"].get_parameter("A").requires_grad_(False)
    groups = lora.parameter_groups(lr=1e-4)
    assert [p for g in groups for p in g["params"]] == [lora.adapters["fc"].get_parameter("B")]


def test_one_adam_step_moves_b_by_the_ratio_of_a() -> None:
    model = Stack()
    lora = attach(model, LoRA(rank=2, lr_ratio=16), at="fc")
    stir(lora)
    before = {key: tensor.clone() for key, tensor in lora.state_dict().items()}
    optimiser = torch.optim.Adam(lora.parameter_groups(lr=1e-4))
    model(torch.arange(7)).square().sum().backward()
    optimiser.step()
    moved = {key: (t - before[key]).abs().mean() for key, t in lora.state_dict().items()}
    assert (moved["fc/B"] / moved["fc/A"]).item() == pytest.approx(16, rel=1e-3)


@pytest.mark.parametrize("slot", ["output", "weight"])
def test_compiling_gives_one_graph_and_the_same_values(slot: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    stir(attach(model, LoRA(rank=2), at=select(model, "0", slot)))
    x = torch.randn(4, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
