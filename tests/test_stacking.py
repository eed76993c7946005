"""A batch with one set per sample: gathered factors, and stacks that an index tensor routes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polyadapt.core import (
    AdaptError,
    AdapterTune,
    DoRA,
    LoRA,
    Recipe,
    activate,
    attach,
    load,
    sets_of,
    stack,
)
from polyadapt.core.recipe import Branching, LowRank
from polyadapt.tests.law_models import BATCH, LAYERS, tokens
from polyadapt.tests.law_table import CELLS, LINEAR, Cell, stir
from polyadapt.tests.resident_sets import resident

STACKABLE = [
    cell
    for cell in CELLS
    if cell.slot == "output"
    and cell.layer in LINEAR
    and isinstance(
        next(iter(cell.attach(cell.model()).adapters.values()), None), LowRank | Branching
    )
]
NAMES = ("b", None, "a", "b")


def two_sets(cell: Cell) -> nn.Module:
    model = cell.model().eval()
    for seed, name in enumerate(("a", "b")):
        cell.adapted(model, name, seed).freeze()
    return model


# Law 9: routing by an index tensor


def test_every_low_rank_method_can_be_stacked() -> None:
    assert {cell.row.recipe.to_json()["method"] for cell in STACKABLE} >= {"LoRA", "DoRA"}
    assert len(STACKABLE) >= 2 * len(LINEAR)


@pytest.mark.parametrize("cell", STACKABLE, ids=str)
def test_an_index_routes_as_the_names_do(cell: Cell) -> None:
    model, x = two_sets(cell), cell.inputs()
    stacked = stack(model, ["a", "b"])
    with torch.no_grad():
        with stacked.route(stacked.index(NAMES)):
            routed = model(x)
        with activate(model, per_sample=NAMES):
            named = model(x)
        with activate(model, None):
            none = model(x)
    assert torch.allclose(routed, named, rtol=0, atol=1e-6)
    assert torch.equal(routed[1], none[1])
    assert (routed[0] - none[0]).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [LoRA(rank=2), DoRA(rank=2)], ids=["LoRA", "DoRA"])
def test_one_graph_serves_any_choice_among_any_number_of_sets(recipe: Recipe) -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model, x = resident(12, recipe), tokens()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    seen = []
    for size in (3, 5, 8, 12):
        stacked = stack(model, [f"s{n}" for n in range(size)])
        for names in ([None] * BATCH, [f"s{size - 1}", None, "s0", "s1"]):
            with torch.no_grad(), stacked.route(stacked.index(names)):
                seen.append((compiled(x) - model(x)).abs().max())
    assert max(seen) < 1e-6
    assert graphs <= 2  # the second is for a number of sets that is no longer a constant


@pytest.mark.slow
def test_a_mixed_batch_by_names_compiles_with_its_gradients() -> None:
    model, x = LAYERS["linear"].model(), tokens()
    for seed, name in enumerate(("a", "b")):
        stir(attach(model, LoRA(rank=2), at="layer", name=name), seed)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with activate(model, per_sample=NAMES):
        assert torch.allclose(compiled(x), model(x), rtol=0, atol=1e-6)
        compiled(x).sum().backward()
    assert all(p.grad is not None for s in sets_of(model).values() for p in s.parameters())


def test_another_choice_written_into_the_index_is_seen() -> None:
    model, x = resident(2, LoRA(rank=2)), tokens()
    stacked = stack(model)
    index = stacked.index(["s0"] * BATCH)
    with torch.no_grad(), stacked.route(index):
        first = model(x)
        index.fill_(-1)
        second = model(x)
    with torch.no_grad(), activate(model, "s0"):
        assert torch.allclose(first, model(x), rtol=0, atol=1e-6)
    with torch.no_grad(), activate(model, None):
        assert torch.equal(second, model(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_sees_the_index_of_its_first_run(reentrant: bool) -> None:
    model: Any = resident(2, LoRA(rank=2))
    model.act = partial(checkpoint, model.act, use_reentrant=reentrant)
    stacked, grads = stack(model), list[Tensor]()
    for later in (None, -1):
        index, x = stacked.index(["s0", "s1", None, "s0"]), tokens().requires_grad_()
        with stacked.route(index):
            y = model(x)
        if later is not None:
            index.fill_(later)
        y.square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])


def test_what_is_gathered_in_inference_mode_serves_in_training() -> None:
    model, x = resident(2, LoRA(rank=2)), tokens().requires_grad_()
    stacked = stack(model)
    with stacked.route(stacked.index(["s0", "s1", None, "s0"])):
        with torch.inference_mode():
            wanted = model(x.detach()).clone()
        y = model(x)
        y.sum().backward()
    assert torch.equal(y.detach(), wanted)
    assert x.grad is not None


def test_a_batch_may_be_empty() -> None:
    model = resident(2, LoRA(rank=2))
    stacked = stack(model)
    with stacked.route(stacked.index([])):
        assert len(model(tokens()[:0])) == 0
    with stacked.route(stacked.index([])), pytest.raises(AdaptError, match="0 names were given"):
        model(tokens())


def test_a_stack_is_a_copy() -> None:
    model, x = resident(2, LoRA(rank=2)), tokens()
    stacked = stack(model)
    with torch.no_grad(), stacked.route(stacked.index(["s0"] * BATCH)):
        before = model(x)
        for factor in sets_of(model)["s0"].parameters():
            factor.zero_()
        assert torch.equal(model(x), before)


# Wrong input


def test_what_cannot_be_stacked_is_refused_by_name() -> None:
    model = LAYERS["linear"].model()
    adapters = attach(model, LoRA(rank=2), at="layer", name="pets")
    with pytest.raises(AdaptError, match=r"set 'pets' is trainable.*freeze it"):
        stack(model)
    adapters.freeze()
    with pytest.raises(AdaptError, match=r"no adapter set is called 'dogs'; attached: \['pets'\]"):
        stack(model, ["dogs"])
    with pytest.raises(AdaptError, match=r"one set or more, each once, got \['pets', 'pets'\]"):
        stack(model, ["pets", "pets"])
    with pytest.raises(AdaptError, match=r"one set or more, each once, got \[\]"):
        stack(model, [])


@pytest.mark.parametrize(
    ("layer", "recipe"),
    [
        ("block", AdapterTune(rank=2)),
        ("in_proj of attention", LoRA(rank=2)),
        ("conv2d", LoRA(rank=2)),
    ],
)
def test_a_method_or_layer_without_the_form_is_refused(layer: str, recipe: Recipe) -> None:
    model = LAYERS[layer].model()
    attach(model, recipe, at=LAYERS[layer].at, name="a").freeze()
    with pytest.raises(AdaptError, match=r"set 'a' \(\w+\) has no low-rank form"):
        stack(model)


def test_a_wrong_index_is_refused_before_anything_runs() -> None:
    stacked = stack(resident(2, LoRA(rank=2)))
    for index, message in (
        (torch.tensor([0, 2]), r"goes from 0 to 2; the stack has sets 0 to 1, and -1"),
        (torch.tensor([-2, 0]), r"goes from -2 to 0"),
        (torch.tensor([0.0]), r"int64 \[batch\], got torch.float32 \[1\]"),
        (torch.tensor(0), r"int64 \[batch\], got torch.int64 \[\]"),
    ):
        with pytest.raises(AdaptError, match=message), stacked.route(index):
            pass
    with pytest.raises(AdaptError, match=r"the stack has no set 's7'; it has \['s0', 's1'\]"):
        stacked.index(["s7"])
    short = pytest.raises(AdaptError, match=f"2 names were given for a batch of {BATCH}")
    with short, stacked.route(stacked.index(["s0", "s1"])):
        stacked.backbone(tokens())


def test_a_stack_that_cannot_act_any_more_is_refused() -> None:
    model = resident(2, LoRA(rank=2))
    stacked = stack(model)
    index, sets = stacked.index(["s0"] * BATCH), sets_of(model)

    def refused(message: str) -> None:
        with pytest.raises(AdaptError, match=message), stacked.route(index):
            pass

    sets["s0"].merge()
    refused("'s0' is merged into the weights: unmerge it first")
    sets["s0"].unmerge()
    model.to(torch.bfloat16)
    refused("layer is torch.bfloat16 now, torch.float32 when stacked: stack again")
    model.to(torch.float32)
    attach(model, LoRA(rank=1), at="front", name="elsewhere")
    for adapters in sets.values():
        adapters.detach()
    refused("no set is attached at layer any more: stack again")


# Gathered factors


def test_sets_of_other_ranks_sites_and_rows_share_a_batch() -> None:
    model, x = LAYERS["rows of a linear"].model().eval(), LAYERS["rows of a linear"].inputs()
    at = LAYERS["rows of a linear"].at.split("[")[0]
    for seed, (name, rank, rows) in enumerate([("a", 3, "[q,v]"), ("b", 2, "[k]"), ("c", 4, "")]):
        stir(attach(model, LoRA(rank=rank), at=f"{at}{rows}", name=name), seed)
    names = ["c", "a", "b", None]
    with torch.no_grad():
        with activate(model, per_sample=names):
            mixed = model(x)
        for n, own in enumerate(names):
            with activate(model, own):
                assert torch.allclose(model(x)[n], mixed[n], rtol=0, atol=1e-6)


def test_a_mixed_batch_trains_every_set_with_its_own_samples() -> None:
    model, x = LAYERS["linear"].model(), tokens()
    sets = {
        name: stir(attach(model, DoRA(rank=2), at="layer", name=name), seed)
        for seed, name in enumerate(("a", "b"))
    }
    with activate(model, per_sample=NAMES):
        model(x).square().sum().backward()
    mixed = {name: [p.grad.clone() for p in s.parameters()] for name, s in sets.items()}  # type: ignore[union-attr]
    for name, adapters in sets.items():
        adapters.zero_grad()
        own = [n for n, other in enumerate(NAMES) if other == name]
        with activate(model, name):
            model(x[own]).square().sum().backward()
        for got, parameter in zip(mixed[name], adapters.parameters(), strict=True):
            assert parameter.grad is not None
            assert torch.allclose(got, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", [LoRA(rank=3, alpha=1), DoRA(rank=3, alpha=1)], ids=str)
def test_scales_keep_the_precision_of_the_factors(recipe: Recipe) -> None:
    model, x = resident(2, recipe).double(), tokens().double()
    for adapters in sets_of(model).values():
        for parameter in adapters.parameters():
            parameter.data = parameter.data.double()
    names, before = ["s0", "s1", "s0", "s1"], torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.no_grad(), activate(model, per_sample=names):
            mixed = model(x)
    finally:
        torch.set_default_dtype(before)
    for n, name in enumerate(names):
        with torch.no_grad(), activate(model, name):
            assert torch.allclose(model(x)[n], mixed[n], rtol=0, atol=1e-12)


def test_a_layer_that_casts_its_weight_takes_a_mixed_batch() -> None:
    """Whisper's do, for half inputs."""
    from whisper.model import Linear

    model, x = nn.Sequential(Linear(8, 8)), torch.randn(4, 3, 8).bfloat16()
    for seed, recipe in enumerate((LoRA(rank=2), DoRA(rank=2))):
        stir(attach(model, recipe, at="0", name=f"s{seed}"), seed).freeze()
    names = ["s1", None, "s0", "s1"]
    with torch.no_grad(), activate(model, per_sample=names):
        mixed = model(x)
    for n, name in enumerate(names):
        with torch.no_grad(), activate(model, name):
            torch.testing.assert_close(model(x)[n], mixed[n], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["names", "per sample", "routed"])
def test_a_set_that_a_context_promises_is_neither_detached_nor_merged(kind: str) -> None:
    model = resident(2, LoRA(rank=2))
    adapters, served = sets_of(model)["s0"], stack(model)
    contexts = {
        "names": activate(model, ["s0", "s1"]),
        "per sample": activate(model, per_sample=["s0", None]),
        "routed": served.route(served.index([None])),
    }
    with contexts[kind], ThreadPoolExecutor(1) as other_thread:
        for verb in (adapters.detach, adapters.merge):
            with pytest.raises(AdaptError, match="leave the context first"):
                verb()
            with pytest.raises(AdaptError, match="leave the context first"):
                other_thread.submit(verb).result()
        attach(model, LoRA(rank=2), at="layer", name="idle").detach()
    adapters.merge()
    adapters.unmerge()
    adapters.detach()


def test_a_copy_made_within_a_context_is_in_none() -> None:
    model = resident(1, LoRA(rank=2))
    with activate(model, "s0"):
        twin = copy.deepcopy(model)
        sets_of(twin)["s0"].detach()
        assert sets_of(twin) == {}
        with pytest.raises(AdaptError, match="leave the context first"):
            sets_of(model)["s0"].detach()


def test_dropout_acts_in_a_mixed_batch_under_training() -> None:
    model, x = LAYERS["linear"].model(), tokens()
    stir(attach(model, LoRA(rank=2, dropout=0.5), at="layer", name="a"))
    with torch.no_grad(), activate(model, per_sample=["a"] * BATCH):
        model.eval()
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


def test_a_stack_of_loaded_sets_serves_them(tmp_path: Path) -> None:
    x = tokens()
    model = LAYERS["linear"].model().eval()
    adapters = stir(attach(model, LoRA(rank=2), at="layer", name="pets"))
    with torch.no_grad():
        wanted = model(x)
    adapters.save(tmp_path / "pets.safetensors")
    fresh = LAYERS["linear"].model().eval()
    load(fresh, tmp_path / "pets.safetensors")
    stacked = stack(fresh)
    with torch.no_grad(), stacked.route(stacked.index(["pets"] * BATCH)):
        assert torch.allclose(fresh(x), wanted, rtol=0, atol=1e-6)
