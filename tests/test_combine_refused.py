"""What cannot be combined is refused in one line, and nothing is changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from polyadapt.core import (
    AdaptError,
    BitFit,
    Bottleneck,
    DoRA,
    LoRA,
    Recipe,
    attach,
    combine,
    sets_of,
)
from polyadapt.tests.combined_sets import A, B
from polyadapt.tests.saved_sets import Net, net, state, wake


def refused(model: nn.Module, weights: Any, **options: Any) -> str:
    """The one line of a refusal that changes nothing."""
    before, sets = state(model), list(sets_of(model))
    with pytest.raises(AdaptError) as error:
        combine(model, weights, **options)
    assert str(error.value).isprintable()
    assert (state(model), list(sets_of(model))) == (before, sets)
    return str(error.value)


@pytest.fixture
def model() -> Net:
    made = net()
    for name in ("one", "two"):
        wake(attach(made, LoRA(rank=2), A, name))
    return made


@pytest.mark.parametrize(
    ("weights", "line"),
    [
        ({}, "combine needs sets with their weights"),
        ([], "combine needs sets with their weights"),
        ({"three": 1.0}, "no adapter set is called 'three'; attached: ['one', 'two']"),
        ([(5, 1.0)], "no adapter set is called 5"),
        ({"one": math.nan}, "'one' has weight nan: a finite number"),
        ({"one": math.inf}, "'one' has weight inf"),
        ({"one": "1"}, "'one' has weight '1'"),
        ({"one": True}, "'one' has weight True"),
        ([("one", 1.0), ("one", 2.0)], "set 'one' is named twice: add its weights"),
        ({"one": 0, "two": 0.0}, "every weight is 0, so nothing is left"),
        (["one", "two"], "combine takes sets and weights"),
        ("one", "combine takes sets and weights"),
        ([("one",)], "combine takes sets and weights"),
        (None, "combine takes sets and weights"),
    ],
)
def test_wrong_weights_are_refused(model: Net, weights: Any, line: str) -> None:
    assert line in refused(model, weights)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"method": "sum"}, "combine by 'sum' is not known: exact or svd or ties or dare"),
        ({"method": "svd"}, "combine by 'svd' needs a rank"),
        ({"method": "svd", "rank": 0}, "rank 0 is not allowed"),
        ({"method": "svd", "rank": 2.0}, "rank 2.0 is not allowed"),
        ({"method": "svd", "rank": 5}, "rank 5 is more than the result can have: at most 4"),
        ({"method": "ties", "rank": 9, "density": 0.5}, "rank 9 is more than the result can have"),
        ({"rank": 2}, "combine by 'exact' keeps the sum of the ranks"),
        ({"density": 0.5}, "combine by 'exact' takes no density"),
        ({"method": "ties", "rank": 2}, "density=None is not in (0, 1]"),
        ({"method": "ties", "rank": 2, "density": 0}, "density=0 is not in (0, 1]"),
        ({"method": "dare", "rank": 2, "density": 1.1}, "density=1.1 is not in (0, 1]"),
        ({"method": "dare", "rank": 2, "density": math.nan}, "density=nan is not in (0, 1]"),
        ({"method": "dare", "rank": 2, "density": 0.5, "seed": 0.5}, "seed=0.5 is not a whole"),
        ({"name": "one"}, "a set called 'one' is attached already"),
        ({"name": "a b"}, "a set's name has letters, digits, _ and - only"),
    ],
)
def test_wrong_settings_are_refused(model: Net, options: dict[str, Any], line: str) -> None:
    assert line in refused(model, {"one": 0.5, "two": 0.5}, **options)


@pytest.mark.parametrize(
    ("recipe", "at"), [(DoRA(rank=2), B), (BitFit(), None), (Bottleneck(rank=2), "blocks.*")]
)
def test_sets_without_a_low_rank_update_are_refused_with_the_way_out(
    model: Net, recipe: Recipe, at: str | None
) -> None:
    attach(model, recipe, at, "other")
    for weights in ({"other": 0.5}, {"one": 1.0, "other": 1.0}):
        line = refused(model, weights)
        assert f"set 'other' ({type(recipe).__name__}) has no low-rank update" in line
        assert "activate(backbone, ['other', ...])" in line


@pytest.mark.parametrize("options", [{}, {"method": "svd", "rank": 1}])
@pytest.mark.parametrize(("number", "weight"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, 1e300)])
def test_what_is_not_finite_is_refused_by_its_site(
    model: Net, number: float, weight: float, options: dict[str, Any]
) -> None:
    with torch.no_grad():
        sets_of(model)["one"].adapters["blocks.1.qkv[q]"].B.fill_(number)  # type: ignore[operator]
    weights = {"one": weight, "two": 1.0}
    site = "blocks.1.qkv[q]" if weight == 1 else "blocks.0.qkv[q]"
    assert f"the update at {site} is not finite" in refused(model, weights, **options)


def test_products_beyond_fp32_are_refused(model: Net) -> None:
    with torch.no_grad():
        for parameter in sets_of(model)["one"].parameters():
            parameter.fill_(1e25)
    for options in ({"method": "svd", "rank": 1}, {"method": "ties", "rank": 1, "density": 0.5}):
        assert "is not finite" in refused(model, {"one": 1.0}, **options)


def test_a_set_of_another_backbone_or_of_none_is_refused(model: Net) -> None:
    other = net()
    foreign = attach(other, LoRA(rank=2), A, "foreign")
    assert "set 'foreign' is on another backbone" in refused(model, [(foreign, 1.0)])
    foreign.detach()
    assert "set 'foreign' is detached" in refused(model, [(foreign, 1.0)])
    assert "no adapter set is called 'one'; attached: []" in refused(net(), {"one": 1.0})


def test_sites_that_share_rows_under_two_names_are_refused(model: Net) -> None:
    attach(model, LoRA(rank=2), "blocks.0.qkv", "whole")
    line = refused(model, {"one": 1.0, "whole": 1.0})
    assert "blocks.0.qkv names the same weight as blocks.0.qkv[q]" in line


def test_nothing_is_combined_over_merged_weights(model: Net) -> None:
    sets_of(model)["one"].merge()
    assert "a set is merged into the weights" in refused(model, {"one": 0.5, "two": 0.5})
