"""SALT's and S-SAM's settings: sizes per site, counts, the regularisers, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from polyadapt.core import SALT, SSAM, AdaptError, AdapterSet, Recipe, attach
from polyadapt.core.sites import Site
from polyadapt.tests.factor_cases import stir


class Block(nn.Module):
    """The adapted layers of a block of SAM's ViT-B, without numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(768, 2304), nn.Linear(768, 768)
        self.lin1, self.lin2 = nn.Linear(768, 3072), nn.Linear(3072, 768)


def encoder() -> nn.Module:
    with torch.device("meta"):
        model = nn.Module()
        model.blocks = nn.ModuleList(Block() for _ in range(12))
        return model


def small(**sizes: int) -> nn.Module:
    """Layers by name, of this many inputs and outputs."""
    torch.manual_seed(0)
    model = nn.Module()
    for name, size in sizes.items():
        model.add_module(name, nn.Linear(size, size))
    return model


def site(*shape: int, path: str = "0") -> Site:
    return Site(path, "weight", None, None, "linear", shape, "output", "")


def filled(made: AdapterSet, **values: Any) -> AdapterSet:
    with torch.no_grad():
        for name, parameter in made.trained().items():
            parameter.copy_(torch.as_tensor(values[name.rpartition("/")[2]]))
    return made


# Sizes


@pytest.mark.parametrize(
    ("k", "top", "rank", "count"),
    [(768, 760, 256, 5_616), (768, 50, 256, 367_716), (768, 50, 4, 5_844), (256, 250, 256, 3_572)],
)
def test_counts_of_a_site_are_those_of_the_card(k: int, top: int, rank: int, count: int) -> None:
    for shape in ((k, k), (3 * k, k), (k, 4 * k)):
        made = SALT(top=top, rank=rank).build(site(*shape), torch.empty(shape, device="meta"), None)
        assert sum(p.numel() for p in made.parameters()) == count == 2 * top + 2 * rank * (k - top)


@pytest.mark.parametrize(("rank", "count"), [(4, 178_272), (256, 8_959_968)])
def test_counts_of_sams_encoder_are_those_of_the_card(rank: int, count: int) -> None:
    recipe = SALT(top=760, rank=rank, tops={"blocks.*.{lin1,lin2}": 50})
    made = attach(encoder(), recipe, at="blocks.*.{qkv,proj,lin1,lin2}")
    assert made.trainable_count() == count
    assert made.stored_count() == count + 48 * 768
    ssam = attach(encoder(), SSAM(), at="blocks.*.{qkv,proj,lin1,lin2}")
    assert ssam.trainable_count() == 48 * 2 * 768


def test_a_larger_top_means_fewer_numbers() -> None:
    counts = [
        attach(small(l=16), SALT(top=top, rank=3), at="l").trainable_count() for top in range(17)
    ]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[16]) == (96, 32)


@pytest.mark.parametrize(
    ("top", "shape", "r"),
    [
        (0.1, (768, 3072), 76),
        (0.1, (9, 20), 1),  # at least one
        (0.5, (9, 20), 4),
        (1.0, (9, 20), 9),
        (1, (9, 20), 1),
        (0, (9, 20), 0),
    ],
)
def test_top_is_a_number_or_a_share_of_the_smaller_side(
    top: float, shape: tuple[int, int], r: int
) -> None:
    assert SALT(top=top).sizes_at(site(*shape)) == (r, 4)


def test_sizes_may_differ_by_site() -> None:
    recipe = SALT(top=2, rank=1, tops={"m.*": 0.5, "v": 1.0}, ranks={"{q,v}": 3})
    names = {"q": (2, 3), "v": (8, 3), "m.fc": (4, 1), "o": (2, 1)}
    found = {name: recipe.sizes_at(site(8, 8, path=name)) for name in names}
    assert found == names
    moved = recipe.renamed({site(8, 8, path=name): f"x.{name}" for name in names})
    assert moved.tops == {"x.m.fc": 0.5, "x.v": 1.0}
    assert moved.ranks == {"x.q": 3, "x.v": 3}


def test_one_and_all_are_not_the_same_top() -> None:
    recipe = SALT(tops={"a.*": 1, "*.q": 1.0})
    with pytest.raises(AdaptError, match=r"tops gives a\.q different tops: 'a\.\*' and '\*\.q'"):
        recipe.sizes_at(site(8, 8, path="a.q"))


@pytest.mark.parametrize(
    "recipe",
    [
        SALT(),
        SALT(top=3, rank=2, clamp="full", init="paper", regularisation=0.01, vectors="stored"),
        SALT(top=1.0, tops={"a.*": 0.25, "b": 3}, ranks={"b": 2}),
        SSAM(regularisation=0.5),
    ],
    ids=str,
)
def test_recipes_survive_json(recipe: Recipe) -> None:
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    if isinstance(recipe, SALT) and isinstance(again, SALT):
        assert type(again.top) is type(recipe.top)


# The regularisers


def test_the_regulariser_of_the_hand_example() -> None:
    model = small(l=3)
    with torch.no_grad():
        model.get_parameter("l.weight").copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    values: dict[str, Any] = {"a": [2.0], "b": [-1.0], "X": [[1.0], [0.0]], "Y": [[0.0, 0.5]]}
    for weight, penalty in ((1.0, 2.5), (0.01, 0.025), (0.0, 0.0)):  # |5 - 3| + |0.5|
        recipe = SALT(top=1, rank=1, regularisation=weight)
        made = filled(attach(model, recipe, at="l"), **values)
        assert made.penalty().item() == pytest.approx(penalty)
        made.detach()


def test_norms_are_not_squared_and_sites_are_summed() -> None:
    made = attach(small(p=4, q=4), SALT(top=2, rank=2, regularisation=0.5), at="{p,q}")
    stir(made)
    total = 0.0
    for adapter in made.adapters.values():
        s, (a, b, x, y) = adapter.get_buffer("s")[:2], adapter.parameters()
        total += ((a * s + b - s).norm() + (x @ y).norm()).item()
    assert made.penalty().item() == pytest.approx(0.5 * total)
    with torch.autocast("cpu", torch.bfloat16):  # as a training step in mixed precision asks
        assert made.penalty().item() == pytest.approx(0.5 * total)


def test_s_sams_regulariser_is_its_own() -> None:
    made = attach(small(l=2), SSAM(regularisation=2.0), at="l")
    filled(made, a=[4.0, -3.0], b=[0.0, 12.0])
    assert made.penalty().item() == pytest.approx(2 * (5 + 12))  # |(1 - 4, 1 + 3)| + |(0, 12)|
    assert SSAM().penalty(made.adapters).item() == 0


@pytest.mark.parametrize(
    "recipe", [SALT(top=2, rank=1, regularisation=1.0), SSAM(regularisation=1.0)], ids=str
)
def test_a_regulariser_at_its_minimum_has_gradients_of_zero(recipe: Recipe) -> None:
    made = attach(small(l=4), recipe, at="l")
    made.penalty().backward()
    for parameter in made.parameters():
        assert parameter.grad is not None
        assert parameter.grad.count_nonzero() == 0


def test_scales_and_shifts_do_not_decay_and_factors_do() -> None:
    made = attach(small(l=4), SALT(top=2, rank=1), at="l")
    (adapter,) = made.adapters.values()
    decaying, plain = made.parameter_groups(lr=1e-3, weight_decay=0.1)
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.1, 0)
    assert [id(p) for p in decaying["params"]] == [id(adapter.X), id(adapter.Y)]
    assert [id(p) for p in plain["params"]] == [id(adapter.a), id(adapter.b)]


# What is refused


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"top": -1}, "top=-1 is not allowed: a whole number from 0, or a share up to 1.0"),
        ({"top": 0.0}, "top=0.0 is not allowed"),
        ({"top": 1.5}, "top=1.5 is not allowed"),
        ({"top": float("nan")}, "top=nan is not allowed"),
        ({"top": True}, "top=True is not allowed"),
        ({"tops": {"a": "b"}}, "top='b' is not allowed"),
        ({"tops": 3}, "tops=3 is not allowed: site pattern -> number"),
        ({"tops": {"a[": 3}}, "a["),
        ({"ranks": {"a": 0}}, "rank 0 is not allowed"),
        ({"rank": 0}, "rank 0 is not allowed"),
        ({"rank": 2.0}, "rank 2.0 is not allowed"),
        ({"clamp": "relu"}, "clamp='relu' is not allowed: diagonal or full or none"),
        ({"init": None}, "init=None is not allowed: kaiming or gaussian or paper"),
        ({"vectors": "hashed"}, "vectors='hashed' is not allowed: recomputed or stored"),
        ({"regularisation": -0.1}, "regularisation=-0.1 is below 0"),
        ({"regularisation": float("inf")}, "regularisation=inf is not allowed"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(AdaptError) as refused:
        SALT(**wrong)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    if {*wrong} <= {"vectors", "regularisation"}:
        with pytest.raises(AdaptError, match="SSAM: "):
            SSAM(**wrong)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (SALT(top=5), "top=5 does not fit l: its weight is [4, 4], so at most 4"),
        (SALT(top=1, rank=5), "rank 5 does not fit l"),
        (SALT(top=1, tops={"x": 2}), "tops has 'x', which fits none of the 1 sites"),
        (SALT(top=1, ranks={"x": 2}), "ranks has 'x', which fits none of the 1 sites"),
    ],
)
def test_settings_that_do_not_fit_the_sites_are_refused(recipe: SALT, words: str) -> None:
    with pytest.raises(AdaptError) as refused:
        attach(small(l=4), recipe, at="l")
    assert words in str(refused.value)


@pytest.mark.parametrize("recipe", [SALT(top=1, rank=1), SSAM()], ids=["SALT", "SSAM"])
def test_sites_whose_vectors_are_any_are_refused_by_name(recipe: Recipe) -> None:
    model = small(l=3, eye=3, empty=3)
    with torch.no_grad():
        nn.init.eye_(model.get_parameter("eye.weight"))
        model.get_parameter("empty.weight")[0, 0] = float("nan")
    method = type(recipe).__name__
    with pytest.raises(AdaptError, match=f"{method}: eye cannot be adapted: its singular values 1"):
        attach(model, recipe, at="{l,eye}")
    with pytest.raises(AdaptError, match=f"{method}: empty cannot be adapted: its weight holds"):
        attach(model, recipe, at="{l,empty}")
    attach(model, recipe.replace(vectors="stored"), at="{l,eye}")
    for wrong in ("0.l.bias", "0"):
        with pytest.raises(AdaptError, match=f"{method}: {wrong} is .*needs a weight matrix"):
            attach(nn.Sequential(small(l=3)), recipe, at=wrong)
