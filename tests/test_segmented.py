"""Mixed batches as on a GPU, through `multi_lora`, whose reference stands in for its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import DoRA, LoRA, Recipe, activate, attach, sets_of, stack
from polyadapt.core import segmented as module
from polyadapt.core.kernels.multi_lora import multi_lora
from polyadapt.core.kernels.segments import segments
from polyadapt.core.segmented import Resident
from polyadapt.tests.law_models import BATCH, LAYERS, tokens
from polyadapt.tests.law_table import stir
from polyadapt.tests.resident_sets import resident

NAMES = ("s2", None, "s0", "s1")
IDS = [2, -1, 0, 1]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What a GPU would do; the ids of each call of the op."""
    made: list[list[int]] = []

    def everywhere(_: Tensor) -> bool:
        return True

    def counted(x: Tensor, y: Tensor, sets: Any, ids: Tensor, made_: Any = None) -> Tensor:
        if not torch.compiler.is_compiling():
            made.append(ids.tolist())
        return multi_lora(x, y, sets, ids, made_)

    monkeypatch.setattr(module, "runs_kernel", everywhere)
    monkeypatch.setattr(module, "multi_lora", counted)
    return made


def three_sets(layer: str = "linear", at: str | None = None) -> nn.Module:
    """s0, s1, s2 of other ranks and scales."""
    model = LAYERS[layer].model().eval()
    for n, (rank, alpha) in enumerate([(1, 3.0), (4, 1.0), (2, 7.0)]):
        recipe = LoRA(rank=rank, alpha=alpha)
        stir(attach(model, recipe, at=at or LAYERS[layer].at, name=f"s{n}"), n).freeze()
    return model


def alone(model: nn.Module, x: Tensor) -> Tensor:
    """Each sample under its own set."""
    rows = []
    for n, name in enumerate(NAMES):
        with activate(model, name):
            rows.append(model(x)[n])
    return torch.stack(rows)


def routed(model: nn.Module) -> Any:
    served = stack(model)
    return served.route(served.index(NAMES))


def named(model: nn.Module) -> Any:
    return activate(model, per_sample=NAMES)


both = pytest.mark.parametrize("way", [routed, named])


@both
@torch.no_grad()
def test_each_sample_goes_through_its_own_set(
    way: Callable[[nn.Module], Any], calls: list[list[int]]
) -> None:
    model, x = three_sets(), tokens()
    with way(model):
        mixed = model(x)
    assert len(calls) == 1
    torch.testing.assert_close(mixed, alone(model, x), rtol=0, atol=1e-5)
    with activate(model, None):
        assert torch.equal(mixed[1], model(x)[1])


@both
def test_gradients_reach_what_is_in_front(
    way: Callable[[nn.Module], Any], calls: list[list[int]]
) -> None:
    model, x = three_sets(), tokens().requires_grad_()
    with way(model):
        (found,) = torch.autograd.grad(model(x).square().sum(), x)
    assert len(calls) == 1
    (wanted,) = torch.autograd.grad(alone(model, x).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_parts_of_a_layers_rows_take_the_op_and_a_set_may_be_absent(calls: list[list[int]]) -> None:
    model, x = LAYERS["rows of a linear"].model().eval(), LAYERS["rows of a linear"].inputs()
    at = LAYERS["rows of a linear"].at.split("[")[0]
    for n, (rank, rows) in enumerate([(3, "[q,v]"), (2, "[k]"), (4, "[k]")]):
        stir(attach(model, LoRA(rank=rank), at=f"{at}{rows}", name=f"s{n}"), n).freeze()
    for way in (routed, named):
        with way(model):
            torch.testing.assert_close(model(x), alone(model, x), rtol=0, atol=1e-5)
    assert calls.count(IDS) == 3  # q, v and k of the stack


def test_sets_that_train_and_sets_with_a_gain_are_gathered(calls: list[list[int]]) -> None:
    model = three_sets()
    sets_of(model)["s0"].adapters["layer"].requires_grad_(True)
    with named(model):
        model(tokens()).sum().backward()
    model = LAYERS["linear"].model().eval()
    for n in range(3):
        stir(attach(model, DoRA(rank=2), at="layer", name=f"s{n}"), n).freeze()
    with torch.no_grad():
        for way in (routed, named):
            with way(model):
                torch.testing.assert_close(
                    model(tokens()), alone(model, tokens()), rtol=0, atol=1e-5
                )
    assert calls == []


@torch.no_grad()
def test_a_stack_holds_each_set_in_its_own_rank_with_its_scale_beside(
    calls: list[list[int]],
) -> None:
    ((held, _),) = stack(three_sets()).parts["layer"]
    assert isinstance(held, Resident)
    assert held.sets.ranks.tolist() == [1, 4, 2, 0]
    assert held.sets.scales.tolist() == [3.0, 0.25, 3.5, 0.0]
    assert len(held.sets.up) == 7


@torch.no_grad()
def test_tiles_are_made_once_for_all_layers_of_an_activation(
    calls: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(ids: Tensor, sets: int, rows: int = 1) -> Any:
        made.append(rows)
        return segments(ids, sets, rows)

    monkeypatch.setattr(module, "segments", counted)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for n in range(3):
        stir(attach(model, LoRA(rank=2), at="*", name=f"s{n}"), n).freeze()
    served = stack(model)
    index = served.index(NAMES)
    with served.route(index):
        model(torch.ones(4, 5, 8))
        model(torch.ones(4, 5, 8))
        model(torch.ones(4, 2, 8))
        index.fill_(0)  # another choice in the same tensor
        model(torch.ones(4, 2, 8))
    assert made == [5, 2, 2]
    assert calls == [IDS] * 6 + [[0] * 4] * 2


def test_a_backward_finds_the_ids_of_its_forward(calls: list[list[int]]) -> None:
    model, grads = three_sets(), list[Tensor]()
    served = stack(model)
    for later in (None, -1):
        index, x = served.index(NAMES), tokens().requires_grad_()
        with served.route(index):
            y = model(x)
        if later is not None:
            index.fill_(later)
        grads += torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(grads[0], grads[1])


def test_what_is_made_in_inference_mode_serves_in_training(calls: list[list[int]]) -> None:
    model, x = three_sets(), tokens().requires_grad_()
    with routed(model):
        with torch.inference_mode():
            wanted = model(x.detach()).clone()
        y = model(x)
        y.sum().backward()
    assert torch.equal(y.detach(), wanted)


@torch.no_grad()
def test_an_empty_batch_and_a_layer_that_casts_its_weight(calls: list[list[int]]) -> None:
    from whisper.model import Linear

    model = nn.Sequential(Linear(8, 8))
    for n in range(3):
        stir(attach(model, LoRA(rank=2), at="0", name=f"s{n}"), n).freeze()
    served, x = stack(model), torch.randn(4, 3, 8).bfloat16()
    with served.route(served.index([])):
        assert model(x[:0]).shape == (0, 3, 8)
    with served.route(served.index(NAMES)):
        mixed = model(x)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, alone(model, x), rtol=0.02, atol=0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("calls")
def test_one_graph_holds_the_op_and_serves_any_choice_among_any_number_of_sets() -> None:
    graphs: list[str] = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph.code)
        return graph.forward

    recipe: Recipe = LoRA(rank=2)
    model, x = resident(8, recipe), tokens()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for size in (3, 5, 8):
        served = stack(model, [f"s{n}" for n in range(size)])
        for names in ([None] * BATCH, [f"s{size - 1}", None, "s0", "s1"]):
            with torch.no_grad(), served.route(served.index(names)):
                torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-6)
    assert all("multi_lora" in code for code in graphs)
    assert len(graphs) <= 2  # the second is for a number of sets that is no longer a constant
