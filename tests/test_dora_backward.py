"""DoRA's own backward: exact gradients, and no more kept activations than LoRA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from polyadapt.core import DoRA, LoRA, attach
from polyadapt.core.adapters import dora
from polyadapt.core.adapters.dora import DoRALinear, row_norm
from polyadapt.core.kernels.row_norm import CHUNK_ELEMENTS
from polyadapt.tests.factor_cases import dora_at, layers, stir


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
        return dict(
            zip(leaves, torch.autograd.grad(y, list(leaves.values()), towards), strict=True)
        )

    x, a, b, m = leaves.values()
    ours = gradients(DoRALinear.apply(x, F.linear(x, w0, b0), a, b, m, norm, w0, b0, 0.7, False))
    detached = gradients(formula(x, w0, b0, a, b, m, 0.7))
    through = gradients(formula(x, w0, b0, a, b, m, 0.7, detached=False))
    for name in leaves:
        torch.testing.assert_close(ours[name], detached[name], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(ours["b"], through["b"])
    torch.testing.assert_close(ours["m"], through["m"])


@pytest.mark.parametrize(("model", "x"), layers())
def test_every_layer_kind_has_the_gradient_of_its_weight_form(model: nn.Module, x: Tensor) -> None:
    model = copy.deepcopy(model).requires_grad_(False)
    adapter, layer = dora_at(model)
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
    adapter, layer = dora_at(model)
    stir(adapter)
    with torch.no_grad():
        adapter.m.copy_(torch.tensor([0.0, 1e-9, 1e-4, 0.3, 1.0]))
    x, towards = torch.randn(7, 6), torch.randn(7, 5)
    a, b, m = (p.detach().double().requires_grad_() for p in adapter.parameters())
    w0, bias = (p.detach().double() for p in model.parameters())
    exact = formula(x.double(), w0, bias, a, b, m, adapter.scale)
    exact_m = torch.autograd.grad(exact, m, towards.double())[0].float()

    def grad_of_m() -> Tensor:
        y = adapter.output(x, model(x), layer)
        return torch.autograd.grad(y, adapter.m, towards)[0]

    torch.testing.assert_close(grad_of_m(), exact_m, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(dora, "SMALLEST_GAIN", 0.0)
    assert not torch.allclose(grad_of_m(), exact_m, rtol=0.1)


def test_only_what_requires_grad_gets_one() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)
    adapter, layer = dora_at(model)
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
    adapter, layer = dora_at(model)
    stir(adapter)
    x, towards = torch.randn(3, 6, 6), torch.randn(model(torch.zeros(3, 6, 6)).shape)
    adapter.output(x, model(x), layer).backward(towards)
    rows = towards.movedim(layer.channel_axis, -1).flatten(0, -2)
    torch.testing.assert_close(model[0].bias.grad, rows.sum(0))


def test_a_layer_that_ignores_autocast_is_followed_in_its_own_dtype() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter, layer = dora_at(model)
    stir(adapter)
    x = torch.randn(4, 6, requires_grad=True)
    leaves = [x, *adapter.parameters()]
    y = model(x).detach()
    exact = adapter.output(x, y, layer)
    expected = torch.autograd.grad(exact.square().sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        moved = adapter.output(x, y, layer)
        assert torch.equal(moved, exact)
        found = torch.autograd.grad(moved.square().sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_second_derivatives_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter, layer = dora_at(model)
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
    adapter, layer = dora_at(model)
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
        super().__init__()  # type: ignore[no-untyped-call]
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
    adapter, layer = dora_at(model, DoRA(rank=4, dropout=dropout))
    stir(adapter, 0.01)
    x = torch.randn(3, 1024)
    with Largest() as largest:
        adapter.output(x, model(x), layer).sum().backward()
    assert largest.elements <= CHUNK_ELEMENTS < 1024 * 2048
    with Largest() as largest:
        adapter.weight(layer.matrix())
    assert largest.elements == 1024 * 2048  # the measure sees such a buffer where there is one


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
