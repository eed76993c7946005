"""Law 9: torch.compile(fullgraph=True) gives the same values, one graph per active tuple."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polyadapt.core import LoRA, activate, attach, sets_of, switch
from polyadapt.tests.law_models import LAYERS, Around, Block, tokens
from polyadapt.tests.law_table import CELLS, Cell, stir

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Backend:
    """aot_eager, counting the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def _compiled(model: nn.Module) -> tuple[Callable[[Tensor], Tensor], Backend]:
    backend = Backend()
    return torch.compile(model, fullgraph=True, backend=backend), backend


def _gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    for parameter in model.parameters():
        parameter.grad = None
    return found


def _step(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), *_gradients(model)]


def _close(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted) > 0
    for ours, plain in zip(found, wanted, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5)


# The compiler sees the slot and the layer kind, not the numbers: LoRA and DoRA bring every layer,
# the other methods their first and their last. The model with features opens a context, which torch
# cannot compile; test_flamingo.py opens it outside.
TRACED = [
    cell
    for cell in CELLS
    if (cell.method in ("LoRA", "DoRA") or cell.layer in (cell.row.layers[0], cell.row.layers[-1]))
    and cell.layer != "block with features"
]
# One per mechanism: rows of an output, a weight's reader, an own backward, the branch's state.
WITH_GRADIENTS = [
    Cell("LoRA", "rows of a linear", "output"),
    Cell("LoRA", "in_proj of attention", "weight"),
    Cell("DoRA", "linear", "output"),
    Cell("MoSA", "block", "output"),
]


@pytest.mark.slow
@pytest.mark.parametrize("cell", TRACED, ids=str)
def test_a_compiled_model_has_the_same_values(cell: Cell) -> None:
    model, x = cell.model(), cell.inputs()
    cell.adapted(model)
    call, backend = _compiled(model)
    with torch.no_grad():
        assert torch.allclose(call(x), model(x), rtol=1e-4, atol=1e-5)
    assert backend.graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize("cell", WITH_GRADIENTS, ids=str)
def test_a_compiled_model_has_the_same_gradients(cell: Cell) -> None:
    assert cell in CELLS
    model, x = cell.model(), cell.inputs()  # in eval: MoSA draws at random in training
    cell.adapted(model)
    call, _ = _compiled(model)
    _close(_step(call, model, x), _step(model, model, x))


@pytest.mark.parametrize(
    ("layer", "mark"), [("linear", ()), ("in_proj of attention", pytest.mark.slow)]
)
def test_there_is_one_graph_per_active_tuple(layer: str, mark: Any) -> None:
    model, x = LAYERS[layer].model(), tokens()
    for seed, name in enumerate("ab"):
        stir(attach(model, LoRA(rank=2), at=LAYERS[layer].at, name=name), seed)
    call, backend = _compiled(model)
    asked: list[Any] = ["a", "b", None, ["a", "b"]]
    for visit in range(2):
        for n, names in enumerate(asked):
            with activate(model, names), torch.no_grad():
                assert torch.allclose(call(x), model(x), atol=1e-5)
            assert backend.graphs == (n + 1 if visit == 0 else len(asked))


@pytest.mark.slow
def test_a_moved_default_is_seen_by_compiled_code() -> None:
    model, x = LAYERS["linear"].model(), tokens()
    for seed, name in enumerate("ab"):
        stir(attach(model, LoRA(rank=2), at="layer", name=name), seed)
    call, _ = _compiled(model)
    for chosen in ("b", "a", None, "b"):
        switch(model, chosen)
        with torch.no_grad():
            assert torch.allclose(call(x), model(x), atol=1e-5)


@pytest.mark.slow
def test_an_optimiser_step_is_seen_by_compiled_code() -> None:
    model, x = LAYERS["in_proj of attention"].model(), tokens()
    adapters = stir(attach(model, LoRA(rank=2), at="attn.in_proj_weight[q]"))
    call, backend = _compiled(model)
    optimiser = torch.optim.SGD(adapters.parameters(), lr=0.1)
    seen = []
    for _ in range(3):
        optimiser.zero_grad()
        y = call(x)
        assert torch.allclose(y, model(x), atol=1e-5)
        y.square().sum().backward()
        optimiser.step()
        seen.append(y.detach())
    assert not torch.allclose(seen[0], seen[2], atol=1e-4)
    assert backend.graphs == 1


@pytest.mark.slow
def test_merging_is_seen_by_compiled_code() -> None:
    model, x = LAYERS["linear"].model(), tokens()
    adapters = stir(attach(model, LoRA(rank=2), at="layer"))
    call, _ = _compiled(model)
    with torch.no_grad():
        y = call(x)
        adapters.merge()
        assert torch.allclose(call(x), y, atol=1e-5)
        adapters.unmerge()
        assert torch.equal(call(x), y)
        adapters.detach()
        assert torch.allclose(call(x), LAYERS["linear"].model()(x), atol=1e-6)


class Checkpointed(Around):
    """Its block is recomputed in backward."""

    def act(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.layer, x, use_reentrant=False)
        return y


@pytest.mark.slow
def test_checkpoints_inside_a_compiled_model_keep_their_sets() -> None:
    model = Checkpointed(Block(), d_out=16).requires_grad_(False)
    for seed, name in enumerate("ab"):
        stir(attach(model, LoRA(rank=2), at="layer.mlp.0", name=name), seed)
    call, _ = _compiled(model)
    found = []
    for forward in (model, call):
        with activate(model, "b"):
            loss = forward(tokens()).square().sum()
        with activate(model, "a"):
            loss.backward()
        assert all(p.grad is None for p in sets_of(model)["a"].parameters())
        found.append(_gradients(model))
    _close(found[1], found[0])
