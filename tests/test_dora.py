"""DoRA: the row norm, the output form and its own backward, the kept norm, memory."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from polyadapt.core import AdaptError, DoRA, LoRA, activate, attach, select
from polyadapt.core.adapters import dora
from polyadapt.core.adapters.dora import DoRAAdapter, DoRALinear, row_norm
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
        return F.linear(x, self.weight.t(), self.bias)


def cases() -> list[Any]:
    torch.manual_seed(1)
    numbers = torch.tensor([[0, 3, 4], [4, 1, 0]])
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    return [
        pytest.param(nn.Sequential(nn.Linear(6, 5)), torch.randn(2, 3, 6), id="linear"),
        pytest.param(nn.Sequential(nn.Linear(6, 5, bias=False)), torch.randn(6), id="no bias"),
        pytest.param(nn.Sequential(Conv1D(5, 6)), torch.randn(2, 3, 6), id="transposed"),
        pytest.param(nn.Sequential(conv), torch.randn(2, 3, 7, 8), id="conv2d"),
        pytest.param(nn.Sequential(nn.Conv1d(3, 5, 3)), torch.randn(2, 3, 9), id="conv1d"),
        pytest.param(nn.Sequential(nn.Embedding(7, 5)), numbers, id="embedding"),
    ]


def adapter_at(
    model: nn.Module, recipe: DoRA | None = None, at: str = "0"
) -> tuple[DoRAAdapter, FrozenLayer]:
    site = select(model, at)[0]
    layer = layer_at(model, site)
    weight = layer.matrix().detach()
    adapter = (recipe or DoRA(rank=2)).build(site, weight, torch.Generator().manual_seed(0))
    assert isinstance(adapter, DoRAAdapter)
    return adapter, layer


def stir(adapter: nn.Module, scale: float = 0.3) -> None:
    with torch.no_grad():
        for n, parameter in enumerate(adapter.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n))
            parameter += scale * noise


def formula(
    x: Tensor,
    w0: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    m: Tensor,
    scale: float,
    detached: bool = True,
) -> Tensor:
    """x (diag(m / n) (W0 + s B A))^T + bias, as the paper writes it."""
    whole = w0 + scale * b @ a
    norm = whole.norm(dim=1)
    return F.linear(x, (m / (norm.detach() if detached else norm))[:, None] * whole, bias)


# The row norm


def test_the_row_norm_of_a_hand_case() -> None:
    w0, a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 1)
    assert row_norm(w0, a, b, 2.0).item() == pytest.approx(41**0.5)  # |(5, 4)|
    assert row_norm(w0, a, b, 0.0).item() == 5.0


@pytest.mark.parametrize("chunk", [1, 7, 64, 10**6])
def test_the_row_norm_is_that_of_the_whole_weight_in_any_chunks(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dora, "CHUNK_ELEMENTS", chunk)
    w0, a, b = (torch.randn(s, dtype=torch.float64) for s in ((11, 9), (3, 9), (11, 3)))
    expected = torch.linalg.norm(w0 + 0.7 * b @ a, dim=1)
    torch.testing.assert_close(row_norm(w0, a, b, 0.7), expected, rtol=1e-12, atol=0)


def test_the_row_norm_stays_exact_where_the_update_cancels_the_weight() -> None:
    a, b = torch.randn(2, 50), torch.randn(40, 2)
    w0 = -(b @ a) + 1e-4 * torch.randn(40, 50)
    exact = (w0.double() + b.double() @ a.double()).norm(dim=1)
    factored = w0.square().sum(1) + 2 * ((w0 @ a.t()) * b).sum(1) + ((b @ (a @ a.t())) * b).sum(1)
    torch.testing.assert_close(row_norm(w0, a, b, 1.0).double(), exact, rtol=2e-3, atol=0)
    assert ((factored.clamp_min(0).sqrt() - exact).abs() / exact).max() > 0.1


def test_a_row_of_zeros_divides_by_no_zero_and_nan_is_not_hidden() -> None:
    a, b = torch.randn(2, 6), torch.randn(5, 2)
    norm = row_norm(b @ a, a, b, -1.0)
    assert norm.min() >= 1e-12
    assert norm.max() < 1e-5
    w0 = torch.zeros(5, 6)
    w0[1, 2] = torch.nan
    assert row_norm(w0, a, b, 1.0).isnan().tolist() == [False, True, False, False, False]
    model = nn.Sequential(nn.Linear(6, 5))
    model[0].weight.data[2] = 0
    adapter, layer = adapter_at(model)
    x = torch.randn(3, 6)
    assert torch.equal(adapter.output(x, model(x), layer), model(x))


# The function


@pytest.mark.parametrize(("model", "x"), cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_new_adapter_changes_no_bit(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    model = copy.deepcopy(model).to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    for dropout in (0.0, 0.5):
        adapter, layer = adapter_at(model, DoRA(rank=2, dropout=dropout))
        y = model(x)
        assert torch.equal(adapter.output(x, y, layer), y)
        assert torch.equal(adapter.weight(layer.matrix()), layer.matrix())


@pytest.mark.parametrize(("model", "x"), cases())
def test_weight_and_output_agree(model: nn.Module, x: Tensor) -> None:
    model = copy.deepcopy(model)
    adapter, layer = adapter_at(model, DoRA(rank=2, alpha=3))
    stir(adapter)
    moved = adapter.output(x, model(x), layer)
    before = model(x)
    with torch.no_grad():
        layer.stored.copy_(layer.as_stored(adapter.weight(layer.matrix()), layer.stored))
    torch.testing.assert_close(moved, model(x))
    assert not torch.allclose(moved, before)


def test_the_output_is_that_of_the_merged_weight_in_double_precision() -> None:
    model = nn.Sequential(nn.Linear(6, 5).double())
    adapter, layer = adapter_at(model)
    stir(adapter)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = F.linear(x, adapter.weight(layer.matrix()), layer.bias)
    torch.testing.assert_close(adapter.output(x, model(x), layer), expected, rtol=0, atol=1e-12)


@given(d_out=st.integers(1, 9), d_in=st.integers(1, 9), share=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_weight_and_output_agree_for_any_shape(d_out: int, d_in: int, share: float) -> None:
    model = nn.Sequential(nn.Linear(d_in, d_out))
    rank = 1 + int(share * (min(d_out, d_in) - 1))
    adapter, layer = adapter_at(model, DoRA(rank=rank))
    with torch.no_grad():
        adapter.B.normal_(std=0.1)
        adapter.m.mul_(1.5)
    x = torch.randn(3, d_in)
    expected = F.linear(x, adapter.weight(layer.matrix()), layer.bias)
    torch.testing.assert_close(adapter.output(x, model(x), layer), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model", "x"), cases())
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
    adapter, layer = adapter_at(model)
    torch.testing.assert_close(adapter.m.data, layer.matrix().norm(dim=1))
    stir(adapter, 1.0)
    norms = adapter.weight(layer.matrix()).norm(dim=1)
    torch.testing.assert_close(norms, adapter.m.abs())


def test_the_magnitude_of_an_embedding_runs_over_the_vocabulary() -> None:
    model = nn.Sequential(nn.Embedding(7, 5))
    adapter, _ = adapter_at(model)
    assert adapter.m.shape == (5,)
    torch.testing.assert_close(adapter.m.data, model[0].weight.norm(dim=0))  # type: ignore[operator, union-attr]


def test_doubling_the_magnitude_doubles_the_output_but_not_the_bias() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter, layer = adapter_at(model)
    with torch.no_grad():
        adapter.m.mul_(2)
    x = torch.randn(3, 6)
    expected = F.linear(x, 2 * layer.matrix(), layer.bias)
    torch.testing.assert_close(adapter.output(x, model(x), layer), expected)


def test_a_gain_near_one_is_not_lost_in_bf16() -> None:
    model = nn.Sequential(nn.Linear(1, 1, dtype=torch.bfloat16))
    with torch.no_grad():
        model[0].weight.fill_(1)  # type: ignore[operator, union-attr]
        model[0].bias.fill_(-1)  # type: ignore[operator, union-attr]
    adapter, layer = adapter_at(model, DoRA(rank=1))
    with torch.no_grad():
        adapter.m.fill_(1 + 2**-10)  # in bf16 this would be 1
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    assert adapter.output(x, model(x), layer).item() == 2**-10


def test_autocast_stays_close_and_leaves_the_weight_exact() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter, layer = adapter_at(model)
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
    adapter, layer = adapter_at(model, DoRA(rank=2, dropout=0.5))
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
    adapter, layer = adapter_at(model, DoRA(rank=2, dropout=0.5))
    stir(adapter)
    x = torch.randn(2, 3, 6, 6)
    torch.manual_seed(3)
    moved = adapter.output(x, model(x), layer)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    change = adapter.weight(layer.matrix()) - layer.matrix()
    torch.testing.assert_close(moved, model(x) + F.conv2d(dropped, change.view(5, 3, 3, 3)))


# The gradient


def core_inputs(bias: bool, gains: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """Leaves in double precision with those gains, the frozen weight, the bias."""
    torch.manual_seed(5)
    sizes = {"x": (2, 3, 6), "a": (2, 6), "b": (gains.numel(), 2)}
    leaves = {k: torch.randn(size, dtype=torch.float64) for k, size in sizes.items()}
    w0 = torch.randn(gains.numel(), 6, dtype=torch.float64)
    leaves["m"] = gains.double() * row_norm(w0, leaves["a"], leaves["b"], 0.7)
    b0 = torch.randn(gains.numel(), dtype=torch.float64) if bias else None
    return {k: t.requires_grad_() for k, t in leaves.items()}, w0, b0


GAINS = [
    pytest.param(torch.tensor([1.0, 1.2, 0.8, -1.5, 0.51]), id="gains above the bound"),
    pytest.param(torch.tensor([0.0, 1e-9, 0.49, -0.1, 1.0]), id="gains below the bound"),
]


@pytest.mark.parametrize("gains", GAINS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
def test_the_backward_is_the_derivative_of_the_forward(
    gains: Tensor, bias: bool, dropped: bool
) -> None:
    leaves, w0, b0 = core_inputs(bias, gains)
    norm = row_norm(w0, leaves["a"], leaves["b"], 0.7)
    trained_bias = () if b0 is None else (b0.requires_grad_(),)

    def core(x: Tensor, a: Tensor, b: Tensor, m: Tensor, *bias: Tensor) -> Tensor:
        own = bias[0] if bias else None
        y = F.linear(x, w0, own)
        result: Tensor = DoRALinear.apply(x, y, a, b, m, norm, w0, own, 0.7, dropped)
        return result

    assert torch.autograd.gradcheck(core, (*leaves.values(), *trained_bias))


@pytest.mark.parametrize("gains", GAINS)
def test_the_gradient_is_that_of_the_formula_with_a_constant_norm(gains: Tensor) -> None:
    leaves, w0, b0 = core_inputs(True, gains)
    towards = torch.randn(2, 3, 5, dtype=torch.float64)
    norm = row_norm(w0, leaves["a"], leaves["b"], 0.7)

    def gradients(y: Tensor) -> dict[str, Tensor]:
        return dict(zip(leaves, torch.autograd.grad(y, leaves.values(), towards), strict=True))

    x, a, b, m = leaves.values()
    ours = gradients(DoRALinear.apply(x, F.linear(x, w0, b0), a, b, m, norm, w0, b0, 0.7, False))
    detached = gradients(formula(x, w0, b0, a, b, m, 0.7))
    through = gradients(formula(x, w0, b0, a, b, m, 0.7, detached=False))
    for name in leaves:
        torch.testing.assert_close(ours[name], detached[name], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(ours["b"], through["b"])
    torch.testing.assert_close(ours["m"], through["m"])


@pytest.mark.parametrize(("model", "x"), cases())
def test_every_layer_kind_has_the_gradient_of_its_weight_form(model: nn.Module, x: Tensor) -> None:
    model = copy.deepcopy(model).requires_grad_(False)
    adapter, layer = adapter_at(model)
    stir(adapter)
    y = adapter.output(x, model(x), layer)
    towards = torch.randn(y.shape)
    ours = torch.autograd.grad(y, list(adapter.parameters()), towards)
    merged = layer.as_stored(adapter.weight(layer.matrix()), layer.stored)
    by_weight = torch.func.functional_call(model, {"0.weight": merged}, (x,))
    for one, other in zip(
        ours, torch.autograd.grad(by_weight, list(adapter.parameters()), towards), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_small_gains_need_their_products_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter, layer = adapter_at(model)
    stir(adapter)
    with torch.no_grad():
        adapter.m.copy_(torch.tensor([0.0, 1e-9, 1e-4, 0.3, 1.0]))
    x, towards = torch.randn(7, 6), torch.randn(7, 5)
    leaves = [p.detach().double().requires_grad_() for p in adapter.parameters()]
    w0, bias = layer.matrix().detach().double(), model[0].bias.detach().double()  # type: ignore[operator, union-attr]
    exact = formula(x.double(), w0, bias, *leaves, adapter.scale)
    exact_m = torch.autograd.grad(exact, leaves[2], towards.double())[0].float()

    def grad_of_m() -> Tensor:
        y = adapter.output(x, model(x), layer)
        return torch.autograd.grad(y, adapter.m, towards)[0]

    torch.testing.assert_close(grad_of_m(), exact_m, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(dora, "SMALLEST_GAIN", 0.0)
    assert not torch.allclose(grad_of_m(), exact_m, rtol=0.1)


def test_only_what_requires_grad_gets_one() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)
    adapter, layer = adapter_at(model)
    stir(adapter)
    x = torch.randn(3, 6, requires_grad=True)
    adapter.A.requires_grad_(False)
    adapter.m.requires_grad_(False)
    adapter.output(x, model(x), layer).sum().backward()
    assert adapter.A.grad is None
    assert adapter.m.grad is None
    assert adapter.B.grad is not None
    torch.testing.assert_close(x.grad, adapter.weight(layer.matrix()).sum(0).expand(3, 6).detach())


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(6, 5)), nn.Sequential(nn.Conv1d(6, 5, 1))]
)
def test_a_bias_that_trains_is_not_scaled(model: Any) -> None:
    adapter, layer = adapter_at(model)
    stir(adapter)
    x, towards = torch.randn(3, 6, 6), torch.randn(model(torch.zeros(3, 6, 6)).shape)
    adapter.output(x, model(x), layer).backward(towards)
    rows = towards.movedim(layer.channel_axis, -1).flatten(0, -2)
    torch.testing.assert_close(model[0].bias.grad, rows.sum(0))


def test_second_derivatives_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter, layer = adapter_at(model)
    x = torch.randn(3, 6)
    loss = adapter.output(x, model(x), layer).square().sum()
    (first,) = torch.autograd.grad(loss, adapter.m, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_changing_the_output_in_place_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True))
    attach(model, DoRA(rank=2), at="0")
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*DoRALinear"):
        model(torch.randn(3, 6)).sum().backward()


def test_per_sample_gradients_by_torch_func_agree_with_a_loop() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)
    adapter, layer = adapter_at(model)
    stir(adapter)
    state = dict(adapter.named_parameters())

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapter = adapter

        def forward(self, x: Tensor) -> Tensor:
            return adapter.output(x, model(x), layer).square().sum()

    call = Call()
    names = {f"adapter.{k}": v.detach() for k, v in state.items()}

    def loss(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        value: Tensor = torch.func.functional_call(call, tensors, (x,))
        return value

    x = torch.randn(4, 6)
    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(names, x)
    for n in range(4):
        alone = torch.autograd.grad(call(x[n]), list(state.values()))
        for name, gradient in zip(state, alone, strict=True):
            torch.testing.assert_close(together[f"adapter.{name}"][n], gradient)


# Memory


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of activations that one forward keeps for backward."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(x)
    assert loss.grad_fn is not None
    return sum(seen.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dora_keeps_hardly_more_activations_than_lora(dropout: float) -> None:
    kept = {}
    for recipe in (LoRA(rank=2, dropout=dropout), DoRA(rank=2, dropout=dropout)):
        layers = [nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 64)]
        model = nn.Sequential(*layers)
        attach(model, recipe, at=["0", "2", "3"])
        kept[type(recipe)] = kept_bytes(model, torch.randn(128, 64))
    assert kept[DoRA] <= 1.2 * kept[LoRA]


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self.elements = max(self.elements, t.numel())
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_buffer_has_the_size_of_the_weight(dropout: float) -> None:
    model = nn.Sequential(nn.Linear(1024, 2048)).requires_grad_(False)
    adapter, layer = adapter_at(model, DoRA(rank=4, dropout=dropout))
    stir(adapter, 0.01)
    x = torch.randn(3, 1024)
    with Largest() as largest:
        adapter.output(x, model(x), layer).sum().backward()
    assert largest.elements <= dora.CHUNK_ELEMENTS < 1024 * 2048
    with Largest() as largest:
        adapter.weight(layer.matrix())
    assert largest.elements == 1024 * 2048  # the measure sees such a buffer where there is one


# The kept norm


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each row norm that is computed."""
    calls: list[int] = []

    def count(*args: Any) -> Tensor:
        calls.append(1)
        return row_norm(*args)

    monkeypatch.setattr(dora, "row_norm", count)
    return calls


def frozen_case() -> tuple[DoRAAdapter, FrozenLayer, nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)
    adapter, layer = adapter_at(model)
    stir(adapter)
    return adapter, layer, model, torch.randn(3, 6)


def expected(adapter: DoRAAdapter, layer: FrozenLayer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return F.linear(x, adapter.weight(layer.matrix()), layer.bias)


def test_the_norm_is_computed_once_until_something_changes(counted: list[int]) -> None:
    adapter, layer, model, x = frozen_case()
    counted.clear()
    with torch.no_grad():
        for _ in range(3):
            adapter.output(x, model(x), layer)
        assert len(counted) == 1
        adapter.m.mul_(2)  # n does not depend on it
        adapter.output(x, model(x), layer)
        assert len(counted) == 1


CHANGES: list[Any] = [
    pytest.param(lambda a, m: a.A.mul_(2), id="A"),
    pytest.param(lambda a, m: a.B.add_(1), id="B"),
    pytest.param(lambda a, m: m[0].weight.mul_(3), id="W0"),
    pytest.param(lambda a, m: m[0].load_state_dict(nn.Linear(6, 5).state_dict()), id="loaded W0"),
    pytest.param(
        lambda a, m: a.load_state_dict({k: v + 1 for k, v in a.state_dict().items()}), id="loaded"
    ),
    pytest.param(lambda a, m: setattr(a.B, "data", a.B.data + 1), id="new storage"),
    pytest.param(lambda a, m: setattr(a, "B", nn.Parameter(a.B + 1)), id="new parameter"),
    pytest.param(lambda a, m: (a.B.data.add_(1), a.invalidate()), id=".data and invalidate"),
    pytest.param(lambda a, m: (a.B.data.add_(1), a.after_step(1, None)), id=".data and after_step"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_next_call(change: Callable[[DoRAAdapter, Any], Any]) -> None:
    adapter, layer, model, x = frozen_case()
    with torch.no_grad():
        adapter.output(x, model(x), layer)
        change(adapter, model)
        moved = adapter.output(x, model(x), layer)
    torch.testing.assert_close(moved, expected(adapter, layer, x))


@pytest.mark.parametrize("fused", [False, True])
def test_no_stale_norm_survives_training(fused: bool) -> None:
    """A fused optimiser writes without raising versions."""
    adapter, layer, model, x = frozen_case()
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=fused)
    for _ in range(3):
        with torch.no_grad():
            moved = adapter.output(x, model(x), layer)
        torch.testing.assert_close(moved, expected(adapter, layer, x))
        moved = adapter.output(x, model(x), layer)
        torch.testing.assert_close(moved, expected(adapter, layer, x))
        moved.square().sum().backward()
        optimiser.step()


def test_a_norm_kept_in_inference_mode_serves_in_training() -> None:
    adapter, layer, model, x = frozen_case()
    adapter.requires_grad_(False)
    with torch.inference_mode():
        adapter.output(x, model(x), layer)
    adapter.m.requires_grad_(True)
    adapter.output(x, model(x), layer).sum().backward()
    assert adapter.m.grad is not None


def test_a_backbone_made_in_inference_mode_is_never_stale(counted: list[int]) -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 5))
        adapter, layer = adapter_at(model)
        x = torch.randn(3, 6)
        adapter.output(x, model(x), layer)
        counted.clear()
        model[0].weight.mul_(3)  # type: ignore[operator, union-attr]
        moved = adapter.output(x, model(x), layer)
        assert len(counted) == 1
        torch.testing.assert_close(moved, expected(adapter, layer, x))


def test_copies_do_not_share_the_kept_norm(counted: list[int]) -> None:
    adapter, layer, model, x = frozen_case()
    with torch.no_grad():
        adapter.output(x, model(x), layer)
        for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
            twin.B.add_(1)
            moved = twin.output(x, model(x), layer)
            torch.testing.assert_close(moved, expected(twin, layer, x))
    assert set(adapter.state_dict()) == {"A", "B", "m"}


def test_threads_share_the_kept_norm() -> None:
    adapter, layer, model, x = frozen_case()
    right = expected(adapter, layer, x)
    wrong: list[float] = []

    def call() -> None:
        with torch.no_grad():
            for _ in range(50):
                moved = adapter.output(x, model(x), layer)
                wrong.extend([1.0] * (not torch.allclose(moved, right, atol=1e-5)))
                adapter.invalidate()

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# In a backbone


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
        pytest.raises(AdaptError, match="reads the frozen weights"),
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


class Checkpointed(nn.Module):
    """Two adapted layers inside one checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5))
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return torch.as_tensor(self.body(x))
        return torch.as_tensor(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = Checkpointed()
    adapters = attach(model, DoRA(rank=2), at="body.{0,2}")
    stir(adapters)
    x = torch.randn(4, 6, requires_grad=True)
    gradients = []
    for way in (None, reentrant):
        model.reentrant = way
        adapters.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad for p in adapters.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        assert torch.equal(plain, checkpointed)
