"""Slots: how often W' is computed, what threads and interrupts leave behind, odd layers."""

from __future__ import annotations

import threading
from collections import Counter, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyadapt.core import (
    AdaptError,
    Bottleneck,
    DoRA,
    FullFineTuning,
    LoRA,
    Recipe,
    activate,
    attach,
    select,
)
from polyadapt.core.inject import frame
from polyadapt.core.slots import WeightSlot
from polyadapt.tests.law_models import LAYERS, Around, Attention, tokens
from polyadapt.tests.law_table import stir

EVERY_WEIGHT = "layer.{linear1,linear2,self_attn.out_proj,self_attn.in_proj_weight}"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each slot has computed its W'."""
    counts: Counter[str] = Counter()
    plain = WeightSlot.adapted

    def counting(slot: WeightSlot, names: Any) -> Tensor:
        counts[f"{slot.path}.{slot.layer.parameter}"] += 1
        return plain(slot, names)

    monkeypatch.setattr(WeightSlot, "adapted", counting)
    return counts


# The memo


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "at", "slots"),
    [
        ("in_proj of attention", "attn.{in_proj_weight,out_proj.weight}", 2),
        ("encoder layer", EVERY_WEIGHT, 4),
        ("linear that is read", "layer", 1),
        ("matrix of the model", "table", 1),
    ],
)
def test_a_weight_is_computed_once_per_call_of_its_reader(
    layer: str, at: str, slots: int, training: bool, grad: bool, computed: Counter[str]
) -> None:
    model = LAYERS[layer].model().train(training)
    attach(model, LoRA(rank=2), at=at)
    for call in (1, 2):
        with torch.set_grad_enabled(grad):
            model(tokens())
        assert list(computed.values()) == [call] * slots


class TwoModes(Around):
    """Reads the weight without grad first, then with grad, as an exponential average would."""

    def act(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = F.linear(x, self.layer.weight).abs().mean()
        return F.linear(x, self.layer.weight) / (1 + scale)


def test_a_value_made_without_grad_is_not_used_where_grad_is_wanted() -> None:
    model = TwoModes(nn.Linear(16, 12))
    adapters = stir(attach(model, LoRA(rank=2), at="layer"))
    model(tokens()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in adapters.parameters())


class TwoAutocasts(Around):
    """Reads the weight outside and inside of autocast."""

    def act(self, x: Tensor) -> Tensor:
        self.outside = self.layer.weight.dtype
        with torch.autocast("cpu", torch.bfloat16):
            self.inside = (self.layer.weight @ self.layer.weight.t()).dtype
        self.after = self.layer.weight.dtype
        return F.linear(x, self.layer.weight)


def test_the_memo_keeps_values_of_two_autocasts_apart(computed: Counter[str]) -> None:
    model = TwoAutocasts(nn.Linear(16, 12))
    attach(model, LoRA(rank=2), at="layer")
    model(tokens())
    assert (model.outside, model.inside, model.after) == (
        torch.float32,
        torch.bfloat16,
        torch.float32,
    )
    assert computed["layer.weight"] == 2


def test_a_write_through_data_is_seen_by_the_next_call() -> None:
    model = LAYERS["in_proj of attention"].model()
    adapters = stir(attach(model, LoRA(rank=2), at="attn.in_proj_weight[q,v]"))
    first = model(tokens())
    next(adapters.parameters()).data.mul_(2)  # leaves the version counter alone
    second = model(tokens())
    adapters.merge()
    assert not torch.allclose(first, second)
    assert torch.allclose(model(tokens()), second, atol=1e-5)


class Stops(Around):
    """Interrupted in the middle of its forward."""

    raises: BaseException | None = None

    def act(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.layer.weight)
        if self.raises:
            raise self.raises
        return y


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=repr)
def test_an_interrupt_leaves_no_memo_behind(error: BaseException) -> None:
    model = Stops(nn.Linear(16, 12))
    adapters = stir(attach(model, LoRA(rank=2), at="layer"))
    model.raises = error
    with pytest.raises(type(error)):
        model(tokens())
    assert frame() is None
    before = model.layer.weight.clone()
    next(adapters.parameters()).data.mul_(2)
    assert not torch.equal(model.layer.weight, before)


class Recursive(Around):
    """Calls itself once, with the weight in use on both levels."""

    def forward(self, x: Tensor, deep: bool = True) -> Tensor:
        y = torch.tanh(F.linear(x, self.layer.weight))
        return self(y, deep=False) + F.linear(y, self.layer.weight) if deep else y


def test_a_reader_may_call_itself() -> None:
    model = Recursive(nn.Linear(16, 16))
    adapters = stir(attach(model, LoRA(rank=2), at="layer"))
    y = model(tokens())
    adapters.merge()
    assert torch.allclose(model(tokens()), y, atol=1e-5)
    assert frame() is None


def test_three_steps_of_an_optimiser_equal_those_of_the_bare_weight() -> None:
    model, bare = Attention(), Attention()
    bare.load_state_dict(model.state_dict())
    attach(model, FullFineTuning(), at="attn.in_proj_weight")
    trained = next(p for n, p in model.named_parameters() if "drawer" in n)
    ours = torch.optim.SGD([trained], lr=0.1)
    theirs = torch.optim.SGD([bare.attn.in_proj_weight], lr=0.1)
    for _ in range(3):
        for net, optimiser in ((model, ours), (bare, theirs)):
            optimiser.zero_grad()
            net(tokens()).square().sum().backward()
            optimiser.step()
    assert torch.allclose(trained, bare.attn.in_proj_weight, atol=1e-6)


@pytest.mark.parametrize("layer", ["linear", "in_proj of attention", "conv2d", "embedding"])
def test_gradients_are_those_of_finite_differences(layer: str) -> None:
    model = LAYERS[layer].model().double()
    adapters = stir(attach(model, LoRA(rank=2), at=LAYERS[layer].at)).double()
    names, tensors = zip(*adapters.named_parameters(), strict=True)
    x = LAYERS[layer].inputs()
    x = x.double()[:1] if x.is_floating_point() else x[:1]
    prefix = "polyadapt_drawer.holder.set_default."

    def out(*values: Tensor) -> Tensor:
        given = {prefix + name: value for name, value in zip(names, values, strict=True)}
        result: Tensor = torch.func.functional_call(model, given, (x,))
        return result

    assert torch.autograd.gradcheck(out, tensors)


@pytest.mark.parametrize("layer", ["linear", "in_proj of attention"])
def test_per_sample_gradients_of_torch_func_sum_to_the_gradient(layer: str) -> None:
    model, x = LAYERS[layer].model(), tokens()
    stir(attach(model, LoRA(rank=2), at=LAYERS[layer].at))
    trained: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if "drawer" in n}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(model, values, (sample[None],))
        return y.square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x)
    model(x).square().sum().backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None
        assert torch.allclose(per_sample[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-4)


# Threads


@pytest.mark.parametrize("layer", ["linear", "encoder layer", "block"])
def test_threads_with_different_sets_do_not_mix(layer: str) -> None:
    model, x = LAYERS[layer].model(), tokens()
    recipe = Bottleneck(rank=2, placement="parallel_ffn") if layer == "block" else LoRA(rank=2)
    wanted: dict[str | None, Tensor] = {}
    for seed, name in enumerate(("a", "b")):
        stir(attach(model, recipe, at=LAYERS[layer].at, name=name), seed)
    for chosen in ("a", "b", None):
        with activate(model, chosen), torch.no_grad():
            wanted[chosen] = model(x)
    mistakes: list[str | None] = []

    def work(name: str | None) -> None:
        for _ in range(100):
            with activate(model, name), torch.no_grad():
                if not torch.equal(model(x), wanted[name]):
                    mistakes.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", None, "a")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mistakes == []


def test_an_override_holds_in_its_own_thread_only() -> None:
    model = LAYERS["linear"].model()
    stir(attach(model, LoRA(rank=2), at="layer"))
    adapted, seen = model(tokens()), []
    with activate(model, None):
        thread = threading.Thread(target=lambda: seen.append(model(tokens())))
        thread.start()
        thread.join()
        assert not torch.equal(model(tokens()), adapted)
    assert torch.equal(seen[0], adapted)


def test_overrides_of_two_models_do_not_meet() -> None:
    models, bare, adapted = [], [], []
    for seed in range(2):
        model = LAYERS["linear"].model(seed)
        bare.append(model(tokens()))
        stir(attach(model, LoRA(rank=2), at="layer", name="a"))
        adapted.append(model(tokens()))
        models.append(model)
    first, second = models
    with activate(first, None), activate(second, "a"):
        assert torch.equal(first(tokens()), bare[0])
        assert torch.equal(second(tokens()), adapted[1])
        with activate(first, "a"), activate(second, None):
            assert torch.equal(first(tokens()), adapted[0])
            assert torch.equal(second(tokens()), bare[1])
        assert torch.equal(first(tokens()), bare[0])


def test_the_override_ends_with_an_exception_too() -> None:
    model = LAYERS["linear"].model()
    stir(attach(model, LoRA(rank=2), at="layer"))
    adapted = model(tokens())
    with pytest.raises(KeyboardInterrupt), activate(model, None):
        raise KeyboardInterrupt
    assert torch.equal(model(tokens()), adapted)


# Odd layers


class Returns(nn.Module):
    """A block whose output is made of (y, extra) by `make`."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.make = nn.Linear(16, 16), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.inner(x), x)


Named = namedtuple("Named", "state cache")


@pytest.mark.parametrize(
    "make", [lambda a, b: (a, b), lambda a, b: [a, b], Named], ids=["tuple", "list", "named"]
)
def test_a_block_may_return_more_than_its_state(make: Callable[[Tensor, Tensor], Any]) -> None:
    model = nn.Sequential(Returns(make))
    x = tokens()
    plain = model(x)
    stir(attach(model, Bottleneck(rank=2), at="0"))
    changed = model(x)
    assert type(changed) is type(plain)
    assert not torch.allclose(changed[0], plain[0])
    assert changed[1] is x


def test_a_block_that_returns_no_tensor_first_is_refused() -> None:
    model = nn.Sequential(Returns(lambda a, b: {"state": a}))
    attach(model, Bottleneck(rank=2), at="0")
    with pytest.raises(AdaptError, match="0 returns dict: its first item must be a tensor"):
        model(tokens())


class Scaled(nn.Linear):
    """A linear layer that is not the linear map of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class Positions(nn.Embedding):
    """Called with states, looks up their positions."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.arange(x.shape[1])) + x


@pytest.mark.parametrize("layer", [Scaled(16, 16), Positions(5, 16)], ids=["scaled", "positions"])
def test_a_layer_with_a_forward_of_its_own_is_adapted_at_its_weight(layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    (site,) = select(model, "0")
    assert (site.slot, site.why[-24:]) == ("weight", "has a forward of its own")
    adapters = stir(attach(model, LoRA(rank=2), at="0"))
    y = model(tokens())
    adapters.merge()
    assert torch.allclose(model(tokens()), y, atol=1e-5)


@pytest.mark.parametrize("recipe", [LoRA(rank=2), DoRA(rank=2)], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("layer", ["linear", "rows of a linear", "conv2d", "rows of a conv2d"])
def test_an_input_without_a_batch_is_a_batch_of_one(layer: str, recipe: Recipe) -> None:
    model, seen = LAYERS[layer].model(), []
    stir(attach(model, recipe, at=LAYERS[layer].at))
    called = model.get_submodule(LAYERS[layer].at.split("[")[0])
    hook = called.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(tokens()[:1])
    hook.remove()
    assert torch.allclose(called(seen[0][0]), called(seen[0])[0], atol=1e-5)


def test_a_hook_that_caches_outputs_sees_the_adapted_one_whenever_it_came() -> None:
    x, seen = tokens(), []
    for hook_first in (True, False):
        model = nn.Sequential(LAYERS["linear"].model())
        layer = model.get_submodule("0.layer")
        if hook_first:
            layer.register_forward_hook(lambda m, args, y: seen.append(y.detach()))
        stir(attach(model, LoRA(rank=2), at="0.layer", generator=torch.Generator().manual_seed(1)))
        if not hook_first:
            layer.register_forward_hook(lambda m, args, y: seen.append(y.detach()))
        with activate(model, None):
            model(x)
        model(x)
    bare, adapted, also_bare, also_adapted = seen
    assert torch.equal(bare, also_bare)
    assert torch.equal(adapted, also_adapted)
    assert not torch.equal(adapted, bare)
