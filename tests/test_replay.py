"""Law 10: a forward that is recomputed in backward sees the sets of its first run, or refuses."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polyadapt.core import LoRA, MoSA, Recipe, activate, attach, select, sets_of, switch
from polyadapt.core.drawer import drawer_of
from polyadapt.core.errors import ReplayError
from polyadapt.core.sites import Sites
from polyadapt.tests.law_checkpoints import UNCHECKPOINTED, WAYS, Tower, Way
from polyadapt.tests.law_table import stir


def _loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel()).cos().view(y.shape)).sum()


def _forward(model: Tower, x: Tensor, name: str | None) -> Tensor:
    with activate(model, name):
        return _loss(model(x))


def _in_thread(work: Callable[[], Any]) -> None:
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def _inside(model: Tower, x: Tensor) -> None:
    with activate(model, "b"):
        _loss(model(x)).backward()


def _after(model: Tower, x: Tensor) -> None:
    _forward(model, x, "b").backward()


def _under_another(model: Tower, x: Tensor) -> None:
    loss = _forward(model, x, "b")
    with activate(model, "a"):
        loss.backward()


def _thread_inside(model: Tower, x: Tensor) -> None:
    with activate(model, "b"):
        _in_thread(_loss(model(x)).backward)


def _thread_after(model: Tower, x: Tensor) -> None:
    _in_thread(_forward(model, x, "b").backward)


def _by_grad(model: Tower, x: Tensor) -> None:
    own = list(sets_of(model)["b"].parameters())
    for parameter, gradient in zip(
        own, torch.autograd.grad(_forward(model, x, "b"), own), strict=True
    ):
        parameter.grad = gradient


def _twice(model: Tower, x: Tensor) -> None:
    loss = _forward(model, x, "b")
    loss.backward(retain_graph=True)
    loss.backward()


def _two_sets(model: Tower, x: Tensor) -> None:
    (_forward(model, x, "a") + 2 * _forward(model, x, "b")).backward()


def _append_forward(losses: list[Tensor], model: Tower, x: Tensor, name: str) -> None:
    losses.append(_forward(model, x, name))


def _two_threads(model: Tower, x: Tensor) -> None:
    losses: list[Tensor] = []
    for name in ("a", "b"):
        _in_thread(partial(_append_forward, losses, model, x, name))
    torch.stack(losses).sum().backward()


def _moved_default(model: Tower, x: Tensor) -> None:
    switch(model, "b")
    loss = _loss(model(x))
    switch(model, "a")
    loss.backward()


def _in_between(model: Tower, x: Tensor) -> None:
    loss = _forward(model, x, "b")
    _forward(model, x, "a").backward()
    with activate(model, None):
        model(x)
    loss.backward()


BACKWARDS = {
    "inside": _inside,
    "after": _after,
    "under another set": _under_another,
    "thread, inside": _thread_inside,
    "thread, after": _thread_after,
    "autograd.grad": _by_grad,
    "twice": _twice,
    "two sets in one loss": _two_sets,
    "two forward threads": _two_threads,
    "default moved": _moved_default,
    "another in between": _in_between,
}


# What torch itself refuses: neither is silent, and neither has to do with adapters.
TORCH_REFUSES = {
    ("timm, reentrant", "autograd.grad"): "not have been used in the graph",
    ("block, reentrant", "autograd.grad"): "not have been used in the graph",
    ("selective", "twice"): "only allowed to backward once",
    ("recompute", "twice"): "only allowed to backward once",
}


def _attached(model: nn.Module, pattern: Any) -> None:
    """Sets a and b, moved off their start."""
    for seed, name in enumerate(("a", "b")):
        stir(attach(model, LoRA(rank=2), at=pattern, name=name), seed)


def _tower(way: Way) -> Tower:
    """Weight slots on the q rows, output slots on the first layers of the MLPs."""
    model = Tower(way)
    by_weight = select(model, "vit.blocks.*.attn.qkv[q]", slot="weight")
    _attached(model, Sites((*by_weight, *select(model, "vit.blocks.*.mlp.fc1"))))
    return model


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _image() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=_seeded(1), requires_grad=True)


def _gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for name in "ab" for p in sets_of(model)[name].parameters()]


def _same(found: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    assert any(gradient is not None for gradient in wanted)
    for ours, plain in zip(found, wanted, strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None and plain is not None:
            assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_without_checkpoints(way: str, backward: str) -> None:
    model, plain = _tower(WAYS[way]), _tower(UNCHECKPOINTED.get(way, WAYS["none"]))
    BACKWARDS[backward](plain, _image())
    if way != "none" and backward == "two forward threads":
        # autograd orders nodes by a counter per forward thread, so it may interleave the two
        with pytest.raises(ReplayError, match="one backward per forward thread"):
            BACKWARDS[backward](model, _image())
    elif (way, backward) in TORCH_REFUSES:
        with pytest.raises(RuntimeError, match=TORCH_REFUSES[way, backward]):
            BACKWARDS[backward](model, _image())
    else:
        BACKWARDS[backward](model, _image())
        _same(_gradients(model), _gradients(plain))
        assert drawer_of(model).records._of == {}


def test_two_forward_threads_may_share_one_set() -> None:
    found = []
    for way in (WAYS["none"], WAYS["block"]):
        model, losses = _tower(way), []
        for scale in (1, 3):
            _in_thread(lambda: losses.append(scale * _forward(model, _image(), "b")))  # noqa: B023
        torch.stack(losses).sum().backward()
        found.append(_gradients(model))
    _same(found[1], found[0])


@pytest.mark.parametrize("way", ["block", "block, reentrant", "recompute"])
def test_a_mixed_batch_is_replayed_as_it_was(way: str) -> None:
    found = []
    for chosen in (WAYS["none"], WAYS[way]):
        model = _tower(chosen)
        with activate(model, per_sample=["a", None, "b"]):
            loss = _loss(model(_image()))
        with activate(model, "b"):
            loss.backward()
        found.append(_gradients(model))
    _same(found[1], found[0])


def test_a_copy_replays_by_its_own_records() -> None:
    model, plain = copy.deepcopy(_tower(WAYS["block"])), _tower(WAYS["none"])
    for net in (model, plain):
        _under_another(net, _image())
    _same(_gradients(model), _gradients(plain))


@pytest.mark.parametrize("way", ["block", "block, reentrant", "recompute"])
@pytest.mark.parametrize(
    ("recipe", "at"),
    [
        (LoRA(rank=2, dropout=0.5), "vit.blocks.*.mlp.fc1"),
        (MoSA(rank=2, experts=3), "vit.blocks.*"),
    ],
    ids=["dropout", "experts"],
)
def test_what_a_method_draws_is_drawn_again(recipe: Recipe, at: str, way: str) -> None:
    found = []
    for chosen in (WAYS["none"], WAYS[way]):
        model = Tower(chosen).train()
        for seed, name in enumerate(("a", "b")):
            stir(attach(model, recipe, at=at, name=name, generator=_seeded(0)), seed)
        torch.manual_seed(5)
        _under_another(model, _image())
        found.append(_gradients(model))
    _same(found[1], found[0])


def test_a_backward_that_raises_does_not_touch_what_comes_after() -> None:
    model, plain = _tower(WAYS["block"]), _tower(WAYS["none"])
    x = _image()
    x.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _forward(model, x, "a").backward()
    for net in (model, plain):
        net.zero_grad()
        _under_another(net, _image())
    assert torch.equal(_forward(model, _image(), None), _forward(plain, _image(), None))
    _same(_gradients(model), _gradients(plain))


def test_a_region_whose_forward_no_module_stamped_is_refused() -> None:
    model = _tower(WAYS["none"])
    block: Any = model.vit.blocks[0]
    tokens = torch.randn(2, 4, 32, requires_grad=True)
    with activate(model, "b"):
        y = checkpoint(lambda z: block.attn.qkv(z) * 2, tokens, use_reentrant=True)
    with pytest.raises(ReplayError, match=r"cannot be told .* call the backbone itself"):
        y.sum().backward()


class Skips(nn.Module):
    """A residual layer that may be skipped, as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.skip = nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        return x if self.skip else x + torch.tanh(self.layer(x))


class Chain(nn.Module):
    """Two layers, checkpointed or not."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Skips(), Skips()])
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def test_a_skipped_layer_does_not_pass_for_the_maker_of_its_input() -> None:
    found = []
    for checkpointed in (False, True):
        model = Chain(checkpointed)
        _attached(model, "layers.*.layer")
        first: Skips = model.layers[0]  # type: ignore[assignment]
        with activate(model, "a"):
            state = model(torch.ones(3, 4))
        first.skip = True
        with activate(model, "b"):
            y = model(state)
        first.skip = False
        y.square().sum().backward()
        found.append(_gradients(model))
    _same(found[1], found[0])


def test_the_function_that_names_a_running_backward_is_still_there() -> None:
    # Private to torch, and used by its own checkpoint; without it no forward can be replayed.
    seen: list[int] = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    assert y.grad_fn is not None
    y.grad_fn.register_prehook(lambda grads: seen.append(torch._C._current_graph_task_id()))
    assert torch._C._current_graph_task_id() == -1
    y.backward()
    y = x * 2
    assert y.grad_fn is not None
    y.grad_fn.register_prehook(lambda grads: seen.append(torch._C._current_graph_task_id()))
    y.backward()
    assert seen[0] >= 0
    assert seen[1] != seen[0]
