"""Block-LoRA in training, where it is a smaller LoRA; its masks, its file and its plain form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from polyadapt.core import (
    AdaptError,
    AdapterSet,
    BlockLoRA,
    LoRA,
    activate,
    attach,
    combine,
    export_peft,
    import_peft,
    load,
    sets_of,
)
from polyadapt.core.adapters.block_lora import RankSplitAdapter, as_plain
from polyadapt.core.adapters.lora import Pair
from polyadapt.core.combine_file import combine_files
from polyadapt.core.combine_rule import Rule
from polyadapt.core.peft.command import export_file
from polyadapt.core.recipe import ActsOnWeight
from polyadapt.core.store import save_form
from polyadapt.tests.adalora_cases import chain
from polyadapt.tests.block_lora_cases import SPLITS, made_at, numbers, rank_split, seeded, update
from polyadapt.tests.factor_cases import layers, site_at, stir

pytestmark = pytest.mark.slow

# Training


def test_all_arms_get_the_gradient_of_the_plain_loras_b() -> None:
    recipe, x = BlockLoRA(rank=6, blocks=3), numbers(4, 6)
    blocked, plain = chain(), chain()
    (block,) = rank_split(made_at(blocked, recipe, "0"))
    (lora,) = made_at(plain, recipe.plain(), "0").adapters.values()
    for model in (blocked, plain):
        model(x).square().sum().backward()
    assert block.B.grad is not None
    wanted = lora.get_parameter("B").grad
    assert wanted is not None
    assert wanted.count_nonzero() > 0
    for arm in block.B.grad.split(2, dim=1):
        assert torch.equal(arm, wanted)
    assert block.A.grad is not None
    assert block.A.grad.count_nonzero() == 0


def trained(recipe: LoRA, decay_of_b: float, steps: int = 20) -> tuple[AdapterSet, Tensor]:
    """AdamW at 0.01 with decay 0.1 on A."""
    model = chain(width=12)
    made = made_at(model, recipe, "{0,2}")
    groups = made.parameter_groups(lr=0.01, weight_decay=0.1)
    for group in groups:
        if group["lr"] != 0.01:
            group["weight_decay"] = decay_of_b
    optimizer = torch.optim.AdamW(groups)
    for step in range(steps):
        x, target = torch.randn(2, 8, 12, generator=Generator().manual_seed(step))
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return made, model(numbers(5, 12)).detach()


@pytest.mark.parametrize(("rank", "blocks"), [(2, 2), (6, 3), (8, 8)])
def test_the_rank_split_is_a_smaller_lora_whose_b_learns_faster(rank: int, blocks: int) -> None:
    recipe = BlockLoRA(rank=rank, blocks=blocks)
    alpha = 1 / math.sqrt(blocks)
    assert recipe.plain() == LoRA(
        rank=rank // blocks, alpha=alpha, scaling="rank_stabilised", lr_ratio=blocks
    )
    block, ours = trained(recipe, decay_of_b=0.1)
    lora, theirs = trained(recipe.plain(), decay_of_b=0.1 / blocks)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    tensors = as_plain(block)[2]
    for key, tensor in lora.state_dict().items():
        torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=1e-5)
        assert tensor.abs().max() > 0.05
    for adapter in rank_split(block):
        arms = adapter.arms()
        assert torch.equal(arms, arms[:, :1].expand_as(arms))  # they never part
    _, other = trained(recipe.plain(), decay_of_b=0.1)
    assert float((ours - other).abs().max()) > 1e-5  # the decay does matter


def test_masks_of_their_own_make_the_arms_distinct() -> None:
    made, _ = trained(BlockLoRA(rank=6, blocks=3, arm_dropout=0.5), decay_of_b=0.1, steps=3)
    for adapter in rank_split(made):
        first, second, third = adapter.arms().unbind(1)
        assert not torch.allclose(first, second)
        assert not torch.allclose(second, third)


@pytest.mark.parametrize(("model", "x"), layers())
def test_every_arm_has_a_mask_of_its_own(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, (site, layer) = BlockLoRA(rank=6, blocks=3, arm_dropout=0.5), site_at(model, "0")
    adapter = recipe.build(site, layer.matrix(), seeded())
    assert isinstance(adapter, RankSplitAdapter)
    stir(adapter)
    y, masks = model(x), torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    hidden = layer.down(x, adapter.A)
    wanted = y + adapter.scale * sum(
        layer.up(layer.channels(mask) * hidden, arm)
        for mask, arm in zip(masks, adapter.arms().unbind(1), strict=True)
    )
    flat = layer.channels(masks.flatten())
    monkeypatch.setattr(F, "dropout", lambda h, rate: h * flat if rate == 0.5 else h / 0)
    torch.testing.assert_close(adapter.output(x, y, layer), wanted)
    adapter.eval()
    a, b, _, scale = adapter.factors()
    quiet = y + scale * layer.up(layer.down(x, a), b)
    torch.testing.assert_close(adapter.output(x, y, layer), quiet)


def test_arm_dropout_keeps_the_mean() -> None:
    pair = Pair(numbers(2, 6), numbers(5, 8), 1.0, 0.0, False)
    adapter, x = RankSplitAdapter(pair, blocks=4, arm_dropout=0.5), numbers(1, 6)
    torch.manual_seed(0)
    several = update(adapter, x.expand(10_000, 6), 5).detach()
    wanted = update(adapter.eval(), x, 5)[0]
    assert several.std(0).min() > 0.1
    assert bool(((several.mean(0) - wanted).abs() < 4 * several.std(0) / 100).all())


def test_input_dropout_acts_beside_arm_dropout() -> None:
    pair = Pair(torch.eye(4), torch.ones(1, 8), 1.0, 0.5, False)
    both = RankSplitAdapter(pair, blocks=2, arm_dropout=0.5)
    torch.manual_seed(0)
    seen = set(update(both, torch.ones(500, 4), 1).flatten().tolist())
    assert seen <= {4.0 * n for n in range(9)}  # 1 / 0.5 twice
    assert len(seen) > 6


def test_a_batch_of_several_sets_drops_in_training_too() -> None:
    model, x = chain(), numbers(4, 6)
    for name in ("a", "b"):
        stir(made_at(model, BlockLoRA(rank=6, blocks=3, arm_dropout=0.5), "0", name))
    with activate(model, per_sample=["a", "b", "a", None]):
        first, second = model(x), model(x)
        model.eval()
        assert torch.equal(model(x), model(x))
    assert not torch.equal(first[:3], second[:3])
    assert torch.equal(first[3], second[3])


# The plain form and the file


@SPLITS
def test_the_plain_form_has_the_outputs_and_less_of_b(split: Any, tmp_path: Path) -> None:
    model, x = chain(width=8), numbers(4, 8)
    made = made_at(model, BlockLoRA(rank=8, blocks=4, split=split, dropout=0.25), "{0,2}", "pets")
    stir(made)
    y = model.eval()(x)
    save_form(made, tmp_path / "plain.safetensors", as_plain(made))
    made.detach()
    plain = load(model, tmp_path / "plain.safetensors")
    assert isinstance(plain.recipe, LoRA)
    assert not isinstance(plain.recipe, BlockLoRA)
    assert (plain.name, plain.recipe.dropout) == ("pets", 0.25)
    torch.testing.assert_close(model.eval()(x), y, rtol=0, atol=1e-6)
    rank = 2 if split == "rank" else 8
    assert {tuple(t.shape) for t in plain.state_dict().values()} == {(rank, 8), (8, rank)}


def test_a_file_keeps_the_arms(tmp_path: Path) -> None:
    model = chain()
    made = made_at(model, BlockLoRA(rank=6, blocks=3, ranks={"2": 3}), "{0,2}")
    stir(made)
    kept = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    assert [list(t.shape) for t in kept.values()] == [[2, 6], [6, 6], [1, 6], [6, 3]]
    made.save(tmp_path / "a.safetensors")
    made.detach()
    again = load(model, tmp_path / "a.safetensors")
    assert again.recipe == made.recipe
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in kept.items())
    assert as_plain(again)[0].ranks == {"2": 1}


@SPLITS
@pytest.mark.parametrize(("rank", "blocks"), [(2, 2), (6, 2), (6, 3), (4, 4)])
def test_peft_gets_a_plain_lora(split: Any, rank: int, blocks: int, tmp_path: Path) -> None:
    model, x = chain(width=12), numbers(4, 12)
    made = made_at(model, BlockLoRA(rank=rank, blocks=blocks, split=split), "{0,2}")
    stir(made)
    y = model(x)
    export_peft(made, tmp_path / "peft")
    made.detach()
    read = import_peft(model, tmp_path / "peft")
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-6)
    assert isinstance(read.recipe, LoRA)
    assert read.recipe.rank == (rank // blocks if split == "rank" else rank)


@SPLITS
def test_sets_combine_exactly(split: Any) -> None:
    model, x = chain(), numbers(4, 6)
    recipe = BlockLoRA(rank=3, blocks=3, split=split)
    updates = []
    for name, weight in (("a", 0.5), ("b", 2.0)):
        made = made_at(model, recipe, "2", name)
        stir(made)
        recipe = recipe.replace(rank=6)
        (adapter,) = made.adapters.values()
        assert isinstance(adapter, ActsOnWeight)
        updates.append(weight * adapter.weight(torch.zeros(6, 6)))
    both = combine(model, {"a": 0.5, "b": 2.0}, name="both")
    with activate(model, "both"):
        weight, bias = model.state_dict()["2.weight"], model.state_dict()["2.bias"]
        wanted = F.linear(model[:2](x), weight + sum(updates), bias)
        torch.testing.assert_close(model(x), wanted)
    assert isinstance(both.recipe, LoRA)


@SPLITS
def test_files_combine_and_reach_peft_without_a_backbone(split: Any, tmp_path: Path) -> None:
    model, x = chain(), numbers(4, 6)
    made = made_at(model, BlockLoRA(rank=6, blocks=3, split=split), "{0,2}")
    stir(made)
    y = model(x)
    made.save(tmp_path / "a.safetensors")
    made.detach()
    halves: dict[str | Path, float] = {
        tmp_path / "a.safetensors": 0.5,
        tmp_path / "b.safetensors": 0.5,
    }
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    combine_files(halves, tmp_path / "both.safetensors", Rule())
    load(model, tmp_path / "both.safetensors")
    torch.testing.assert_close(model(x), y)
    sets_of(model)["combined"].detach()
    export_file(tmp_path / "a.safetensors", None, None, str(tmp_path / "peft"))
    import_peft(model, tmp_path / "peft")
    torch.testing.assert_close(model(x), y)


def test_the_plain_form_of_another_method_is_refused() -> None:
    with pytest.raises(AdaptError, match="as_plain is a form of BlockLoRA's sets, not of LoRA's"):
        as_plain(attach(chain(), LoRA(rank=2), "0"))
