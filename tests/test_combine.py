"""Combining sets: sums are exact, one set alone is itself, what is cut is stated."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polyadapt.core import (
    AdaLoRA,
    AdaptError,
    AdapterSet,
    Bottleneck,
    DoRA,
    LoRA,
    Recipe,
    activate,
    attach,
    combine,
    load,
    sets_of,
)
from polyadapt.tests.combined_sets import TINY, A, B, deltas, far, trained, wanted
from polyadapt.tests.saved_sets import INPUT, METHODS, Net, net, wake

# ---- exact sums

RECIPES = st.builds(
    LoRA,
    rank=st.integers(1, 4),
    alpha=st.sampled_from([None, 1.0, 3.0, -16.0]),
    scaling=st.sampled_from(["standard", "rank_stabilised"]),
    ranks=st.sampled_from([{}, {"blocks.0.*": 3}]),
)
PLACES = st.sampled_from([A, B, f"{{{B},head}}", ["blocks.*.qkv[v]", "head"], "blocks.*.mlp"])
PARTS = st.lists(st.tuples(RECIPES, PLACES, st.floats(-3, 3)), min_size=1, max_size=3)


def several(parts: list[tuple[LoRA, Any, float]]) -> tuple[Net, list[tuple[AdapterSet, float]]]:
    model = net().double()
    made: list[tuple[AdapterSet, float]] = []
    for n, (recipe, at, weight) in enumerate(parts):
        paths = [at] if isinstance(at, str) else at
        fitting = recipe if any("blocks" in path for path in paths) else recipe.replace(ranks={})
        made.append(
            (trained(model, f"set{n}", fitting.replace(rank=min(3, recipe.rank)), at, n), weight)
        )
    return model, made


@settings(max_examples=40, deadline=None)
@given(PARTS)
def test_the_exact_sum_is_the_sum_of_the_dense_updates(parts: list[Any]) -> None:
    model, made = several(parts)
    if not any(weight for _, weight in made):
        with pytest.raises(AdaptError, match="every weight is 0"):
            combine(model, made)
        return
    whole = combine(model, made, name="whole")
    used = [(s, w) for s, w in made if w]
    assert far(deltas(whole), wanted(*used)) < TINY
    assert sets_of(model)["whole"] is whole


@pytest.mark.parametrize(
    ("method", "options"), [("exact", {}), ("ties", {"rank": 8, "density": 0.5})]
)
@settings(max_examples=10, deadline=None)
@given(parts=PARTS)
def test_the_order_of_the_sets_changes_rounding_only(
    parts: list[Any], method: Any, options: dict[str, Any]
) -> None:
    model, made = several([(recipe, at, weight or 1.0) for recipe, at, weight in parts])
    first = deltas(combine(model, made, "first", method=method, **options))
    for n, order in enumerate(permutations(made)):
        other = deltas(combine(model, list(order), f"order{n}", method=method, **options))
        assert far({name: other[name] for name in first}, first) < 1e-9


def test_outputs_add_up() -> None:
    """A linear model: the output of the sum is the sum of the outputs' changes."""
    model = nn.Sequential(nn.Linear(8, 8)).double()
    one = trained(model, "one", LoRA(rank=2, alpha=5, scaling="rank_stabilised"), "0", 1)
    two = trained(model, "two", LoRA(rank=3), "0", 2)
    x = INPUT.double()
    outputs = {}
    for name in (None, "one", "two"):
        with activate(model, name):
            outputs[name] = model(x)
    combine(model, {"one": 0.7, "two": -0.3}, name="both")
    change = 0.7 * (outputs["one"] - outputs[None]) - 0.3 * (outputs["two"] - outputs[None])
    torch.testing.assert_close(model(x), outputs[None] + change, rtol=1e-12, atol=1e-12)
    assert (one.trainable_count(), two.trainable_count()) == (32, 48)


def test_a_sum_worked_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    made = [attach(model, LoRA(rank=1, alpha=2), "0", name) for name in ("one", "two")]
    for adapters, a, b in zip(
        made, ([1.0, 2.0], [3.0, -1.0]), ([1.0, 0.0], [2.0, 4.0]), strict=True
    ):
        adapters.load_state_dict({"0/A": torch.tensor([a]), "0/B": torch.tensor([b]).mT})
    whole = combine(model, {"one": 0.5, "two": 0.25})
    # 0.5 * 2 * [[1, 2], [0, 0]] + 0.25 * 2 * [[6, -2], [12, -4]]
    assert deltas(whole)["0"].tolist() == [[4.0, 1.0], [6.0, -2.0]]
    assert whole.recipe.to_json()["rank"] == 2
    assert whole.extra["combined"]["error"] == 0


def test_adalora_adds_its_living_triplets_only() -> None:
    model = net().double()
    ada = trained(model, "ada", AdaLoRA(rank=2, initial_rank=3), B, 1)
    with torch.no_grad():
        ada.adapters["blocks.0.mlp"].E.copy_(torch.tensor([2.0, 0.0, -1.0]))  # type: ignore[operator]
        ada.adapters["blocks.1.mlp"].E.zero_()  # type: ignore[operator]
    one = trained(model, "one", LoRA(rank=1), B, 2)
    whole = combine(model, [(ada, 0.5), (one, 2.0)])
    assert [len(a.state_dict()["A"]) for a in whole.adapters.values()] == [3, 2]
    assert far(deltas(whole), wanted((ada, 0.5), (one, 2.0))) < TINY


def test_sites_that_only_one_set_has_keep_their_rank_and_update() -> None:
    model = net().double()
    one = trained(model, "one", LoRA(rank=2), A, 1)
    two = trained(model, "two", LoRA(rank=3), [A, "blocks.1.mlp"], 2)
    whole = combine(model, [(one, 1.0), (two, 2.0)])
    ranks = {name: len(adapter.state_dict()["A"]) for name, adapter in whole.adapters.items()}
    assert ranks == {**dict.fromkeys(one.adapters, 5), "blocks.1.mlp": 3}
    assert far(deltas(whole), wanted((one, 1.0), (two, 2.0))) < TINY


def test_a_sum_of_ranks_beyond_a_short_side_is_held_whole_beside_an_identity() -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 8)).double()
    made = [(trained(model, f"s{n}", LoRA(rank=2), "*", n), 1.0 + n) for n in range(3)]
    whole = combine(model, made)
    assert whole.recipe.to_json()["rank"] == 3
    assert far(deltas(whole), wanted(*made)) < TINY


@pytest.mark.parametrize("name", ["fc", "odd name"])
def test_ranks_that_names_cannot_tell_apart_are_filled_up_with_zeros(name: str) -> None:
    """`fc` as a pattern also fits `inner.fc`; a name with a blank is no pattern at all."""
    inner = nn.Sequential()
    inner.add_module("fc", nn.Linear(8, 8))
    model = nn.Sequential()
    model.add_module(name, nn.Linear(8, 8))
    model.add_module("inner", inner)
    model.double()
    outer = name if name == "fc" else "*.weight"
    one = trained(model, "one", LoRA(rank=2), [outer, "inner.fc"] if name == "fc" else outer, 1)
    two = trained(model, "two", LoRA(rank=3), "inner.fc", 2)
    weighted = [(one, 1.0), (two, 1.0)]
    whole = combine(model, weighted)
    assert whole.recipe == LoRA(rank=5 if name == "fc" else 3)
    assert far(deltas(whole), wanted(*weighted)) < TINY


def test_autocast_does_not_round_a_sum() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    made = [(wake(attach(model, LoRA(rank=3), "0", f"s{n}")), 0.5) for n in range(2)]
    plain = combine(model, made, "plain").state_dict()
    with torch.autocast("cpu"):
        under = combine(model, made, "under").state_dict()
    assert all(torch.equal(plain[key], under[key]) for key in plain)


def test_a_combined_set_trains_and_comes_back_from_its_file(tmp_path: Any) -> None:
    model = net()
    made = {n: 0.5 for n in ("one", "two") if wake(attach(model, LoRA(rank=2), A, n))}
    whole = combine(model, made)
    assert all(p.requires_grad for p in whole.parameters())
    model(INPUT).sum().backward()
    assert all(p.grad is not None for p in whole.parameters())
    whole.save(tmp_path / "whole.safetensors")
    expected, fresh = model(INPUT), net()
    again = load(fresh, tmp_path / "whole.safetensors")
    assert torch.equal(fresh(INPUT), expected)
    assert again.extra["combined"] == whole.extra["combined"]


# ---- one set is itself


@pytest.mark.parametrize(("recipe", "at"), METHODS, ids=lambda v: type(v).__name__)
def test_one_set_at_weight_1_is_itself_bit_for_bit(recipe: Recipe, at: str | None) -> None:
    model = net()
    one = wake(attach(model, recipe, at, "one"))
    one.extra, one.head = {"labels": ["cat"]}, {"weight": torch.ones(2)}
    expected = model(INPUT)
    same = combine(model, {"one": 1.0}, name="same")
    assert same.recipe == one.recipe
    assert same.sites == one.sites
    assert {k: t.tolist() for k, t in same.state_dict().items()} == {
        k: t.tolist() for k, t in one.state_dict().items()
    }
    assert torch.equal(model(INPUT), expected)
    assert (same.extra, list(same.head)) == (one.extra, ["weight"])
    with torch.no_grad():  # a copy: training it leaves the other alone
        before = [p.clone() for p in one.parameters()]
        for parameter in same.parameters():
            parameter.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), before, strict=True))


def test_sets_at_weight_0_count_for_nothing() -> None:
    model = net()
    dora = wake(attach(model, DoRA(rank=2), B, "dora"))
    wake(attach(model, Bottleneck(rank=2), "blocks.*", "other"))
    same = combine(model, {"dora": 1, "other": 0.0})
    assert same.recipe == dora.recipe
    assert same.state_dict().keys() == dora.state_dict().keys()


def test_heads_and_extras_stay_where_all_agree() -> None:
    model = net()
    one, two = (wake(attach(model, LoRA(rank=2), A, name)) for name in ("one", "two"))
    one.extra, two.extra = {"size": 8, "labels": ["cat"]}, {"size": 8, "labels": ["dog"]}
    one.head, two.head = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    whole = combine(model, {"one": 0.5, "two": 0.5}, "alike")
    assert whole.extra["size"] == 8
    assert "labels" not in whole.extra
    assert whole.head["w"].tolist() == [1.0, 1.0]
    two.head = {"w": torch.zeros(2)}
    assert combine(model, {"one": 0.5, "two": 0.5}, "unlike").head == {}


# ---- cut to a rank


@settings(max_examples=25, deadline=None)
@given(PARTS, st.integers(1, 4))
def test_the_stated_error_is_the_measured_one_and_the_smallest(parts: list[Any], rank: int) -> None:
    model, made = several(parts)
    made = [(s, w if abs(w) > 1e-3 else 1.0) for s, w in made]
    exact = wanted(*made)
    whole = combine(model, made, "whole").state_dict()
    largest = max(len(a) for name, a in whole.items() if name.endswith("/A"))
    cut = combine(model, made, method="svd", rank=min(rank, largest))
    stated, found = cut.extra["combined"], deltas(cut)
    assert stated["error"] == pytest.approx(far(found, exact), abs=1e-12)
    for name, delta in exact.items():
        error = float((found[name] - delta).norm() / delta.norm())
        assert stated["errors"][name] == pytest.approx(error, abs=1e-12)
        values = torch.linalg.svdvals(delta)
        best = values[min(rank, largest) :].norm() / values.norm()
        assert error == pytest.approx(float(best), abs=1e-12)


def test_the_error_worked_by_hand() -> None:
    """diag(4, 3) at rank 1 loses 3 of 5; the other site loses nothing: 3 of sqrt(25 + 144)."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    one = attach(model, LoRA(rank=2), "*", "one")
    eye = torch.eye(2)
    one.load_state_dict(
        {"0/A": eye, "0/B": torch.diag(torch.tensor([4.0, 3.0])), "1/A": eye, "1/B": eye}
    )
    with torch.no_grad():
        one.adapters["1"].B.copy_(torch.diag(torch.tensor([12.0, 0.0])))  # type: ignore[operator]
    cut = combine(model, {"one": 1.0}, method="svd", rank=1)
    stated = cut.extra["combined"]
    assert stated["errors"] == {"0": pytest.approx(0.6), "1": pytest.approx(0.0, abs=1e-7)}
    assert stated["error"] == pytest.approx(3 / 13)
    torch.testing.assert_close(deltas(cut)["0"], torch.diag(torch.tensor([4.0, 0.0])))


def test_a_rank_that_is_there_already_changes_nothing() -> None:
    model = net()
    one = wake(attach(model, LoRA(rank=2), A, "one"))
    kept = combine(model, [(one, 1.0)], method="svd", rank=2)
    assert torch.equal(
        kept.state_dict()["blocks.0.qkv[q]/A"], one.state_dict()["blocks.0.qkv[q]/A"]
    )
    assert kept.extra["combined"]["error"] == 0
