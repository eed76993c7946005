"""LoRA's settings: scale, ranks per site, LoRA+ groups, counts, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import AdaptError, DoRA, LoRA, Recipe, attach
from polyadapt.core.sites import Site
from polyadapt.tests.factor_cases import lora_at, stir


@pytest.mark.parametrize(
    ("recipe", "scale"),
    [
        (LoRA(rank=16, alpha=16), 1.0),
        (LoRA(rank=16, alpha=16, scaling="rank_stabilised"), 4.0),
        (LoRA(rank=4, alpha=16), 4.0),
        (LoRA(rank=4), 1.0),
        (LoRA(rank=4, scaling="rank_stabilised"), 2.0),
        (LoRA(rank=4, ranks={"0": 8}), 0.5),
    ],
)
def test_the_scale_follows_the_rule(recipe: LoRA, scale: float) -> None:
    adapter, _ = lora_at(nn.Sequential(nn.Linear(16, 16)), recipe)
    assert adapter.scale == scale


def test_alpha_is_saved_as_the_number_that_acts() -> None:
    recipe = LoRA(rank=4)
    assert recipe.alpha == 4.0
    assert recipe == LoRA(rank=4, alpha=4)
    assert recipe.replace(rank=8).alpha == 4.0
    text = json.dumps(LoRA(rank=4, ranks={"a.*": 2}, dropout=0.1).to_json())
    assert json.loads(text)["alpha"] == 4.0
    assert Recipe.from_json(json.loads(text)) == LoRA(rank=4, ranks={"a.*": 2}, dropout=0.1)
    ranks = {"a.*": 2}
    recipe = LoRA(ranks=ranks)
    ranks["a.*"] = 4
    assert recipe.ranks == {"a.*": 2}
    assert hash(LoRA(ranks={"a": 1})) == hash(LoRA(ranks={"b": 1}))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 15)


def test_ranks_set_the_rank_of_the_sites_they_fit() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    lora = attach(model, LoRA(rank=2, ranks={"{0,1}": 4}), at="*")
    ranks = {name: adapter.get_parameter("A").shape[0] for name, adapter in lora.adapters.items()}
    assert ranks == {"0": 4, "1": 4, "2": 2}
    assert lora.trainable_count() == (4 + 4 + 2) * 16


def test_ranks_know_the_parts_of_fused_projections() -> None:
    lora = attach(Fused(), LoRA(rank=1, ranks={"qkv[v]": 3}), at="qkv[q,v]")
    shapes = {name: adapter.get_parameter("A").shape for name, adapter in lora.adapters.items()}
    assert shapes == {"qkv[q]": (1, 6), "qkv[v]": (3, 6)}


def test_a_rank_for_no_site_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(AdaptError, match=r"ranks has 'blocks\.\*', which fits none of the 1 sites"):
        attach(model, LoRA(ranks={"0": 4, "blocks.*": 4}), at="0")


def test_ranks_that_disagree_are_refused() -> None:
    with pytest.raises(AdaptError, match=r"ranks gives 0 different ranks: '0' and '\*'"):
        attach(nn.Sequential(nn.Linear(8, 8)), LoRA(ranks={"0": 4, "*": 2}), at="0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank 0 is not allowed"),
        ({"rank": 2.0}, "rank 2.0 is not allowed"),
        ({"rank": True}, "rank True is not allowed"),
        ({"alpha": 0}, "alpha=0 is not allowed"),
        ({"alpha": math.nan}, "alpha=nan is not allowed"),
        ({"alpha": "8"}, "alpha='8' is not allowed"),
        ({"scaling": "rslora"}, "scaling='rslora' is not allowed: standard or rank_stabilised"),
        ({"init": "zeros"}, "init='zeros' is not allowed: kaiming or gaussian"),
        ({"init_std": 0.1}, "init_std=0.1 is not allowed"),
        ({"init": "gaussian", "init_std": 0.0}, "init_std=0.0 is not allowed"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout=-0.1 is not in"),
        ({"lr_ratio": 0}, "lr_ratio=0 is not allowed"),
        ({"embedding_lr": 0.0}, "embedding_lr=0.0 is not allowed"),
        ({"ranks": {"0": 0}}, "rank 0 is not allowed"),
        ({"ranks": {"a{b": 2}}, "braces must be closed"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdaptError, match=message) as error:
        LoRA(**changes)
    assert "\n" not in str(error.value)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.position = nn.Parameter(torch.zeros(1, 3, 8))
        self.attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("norm.bias", r"norm.bias is of shape \[8\]: a low-rank update needs a weight matrix"),
        ("position", r"position is of shape \[1, 3, 8\]"),
        ("attention", "attention is a whole module: a low-rank update needs"),
    ],
)
def test_sites_without_a_matrix_are_refused_by_name(pattern: str, message: str) -> None:
    with pytest.raises(AdaptError, match=message):
        attach(Holder(), LoRA(rank=2), at=pattern)


def test_a_rank_that_does_not_fit_is_refused_by_name() -> None:
    message = r"rank 6 does not fit 0: its weight is \[5, 6\], so at most 5"
    with pytest.raises(AdaptError, match=message):
        attach(nn.Sequential(nn.Linear(6, 5)), LoRA(rank=6), at="0")


def test_dropout_is_refused_where_the_weight_is_read() -> None:
    with pytest.raises(
        AdaptError, match=r"dropout=0.1 cannot act on attention.in_proj_weight\[q\]"
    ):
        attach(Holder(), LoRA(rank=2, dropout=0.1), at="attention.in_proj_weight[q]")


def vit_b_block() -> Iterator[tuple[Site, Tensor]]:
    """The four linear layers of a block of ViT-B/16."""
    shapes = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
    for path, shape in shapes.items():
        site = Site(path, "weight", None, None, "linear", shape, "output", "")
        yield site, torch.zeros(1).expand(shape)


def test_counts_are_those_of_the_card() -> None:
    built = [LoRA(rank=8).build(site, w, None) for site, w in vit_b_block()]
    assert 12 * sum(p.numel() for adapter in built for p in adapter.parameters()) == 1_179_648
    conv = attach(nn.Sequential(nn.Conv2d(3, 5, 3)), LoRA(rank=2), at="0")
    assert conv.trainable_count() == conv.stored_count() == 2 * (3 * 9 + 5)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.embed(x))
        return y


def rates(groups: list[dict[str, Any]], adapters: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """site/tensor -> (learning rate, weight decay)."""
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups)
    return {
        f"{site}/{name}": found[id(p)]
        for site, adapter in adapters.items()
        for name, p in adapter.named_parameters()
    }


def test_lora_plus_gives_b_its_own_rate_and_embeddings_theirs() -> None:
    lora = attach(Stack(), LoRA(rank=2, lr_ratio=16), at=["embed", "fc"])
    groups = lora.parameter_groups(lr=1e-4, weight_decay=0.1)
    assert rates(groups, lora.adapters) == {
        "embed/A": (1e-6, 0.1),
        "embed/B": (1e-6, 0.1),
        "fc/A": (1e-4, 0.1),
        "fc/B": (pytest.approx(1.6e-3), 0.1),
    }


def test_magnitudes_learn_as_fast_as_b_and_do_not_decay() -> None:
    dora = attach(Stack(), DoRA(rank=2, lr_ratio=16), at=["embed", "fc"])
    found = rates(dora.parameter_groups(lr=1e-4, weight_decay=0.1), dora.adapters)
    assert found["embed/m"] == found["fc/m"]
    assert found["fc/m"][0] == pytest.approx(1.6e-3)
    assert found["fc/m"][1] == 0
    assert found["embed/B"] == (1e-6, 0.1)


def test_without_a_ratio_all_factors_learn_alike() -> None:
    lora = attach(Stack(), LoRA(rank=2), at=["embed", "fc"])
    groups = lora.parameter_groups(lr=1e-4, weight_decay=0.1)
    assert set(rates(groups, lora.adapters).values()) == {(1e-4, 0.1)}


def test_tensors_that_do_not_train_are_in_no_group() -> None:
    lora = attach(Stack(), LoRA(rank=2, lr_ratio=16), at="fc")
    lora.adapters["fc"].get_parameter("A").requires_grad_(False)
    groups = lora.parameter_groups(lr=1e-4)
    assert [p for g in groups for p in g["params"]] == [lora.adapters["fc"].get_parameter("B")]


def test_one_adam_step_moves_b_by_the_ratio_of_a() -> None:
    model = Stack()
    lora = attach(model, LoRA(rank=2, lr_ratio=16), at="fc")
    stir(lora)
    before = {key: tensor.clone() for key, tensor in lora.state_dict().items()}
    optimiser = torch.optim.Adam(lora.parameter_groups(lr=1e-4))
    model(torch.arange(7)).square().sum().backward()
    optimiser.step()
    moved = {key: (t - before[key]).abs().mean() for key, t in lora.state_dict().items()}
    assert (moved["fc/B"] / moved["fc/A"]).item() == pytest.approx(16, rel=1e-3)
