"""Block-LoRA: both readings of the cut, by hand, against LoRA, by count, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyadapt.core import AdaptError, BlockLoRA, LoRA, attach, select
from polyadapt.core.adapters.block_lora import InputSplitAdapter, RankSplitAdapter, as_plain
from polyadapt.core.adapters.lora import Pair
from polyadapt.core.recipe import LowRank
from polyadapt.tests.adalora_cases import chain
from polyadapt.tests.block_lora_cases import SPLITS, made_at, numbers, seeded, update
from polyadapt.tests.factor_cases import layers, site_at, stir


class Towers(nn.Module):
    """The attention of CLIP's ViT-B/16: 12 blocks of width 768 and 12 of width 512, no numbers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.vision = nn.ModuleList(nn.MultiheadAttention(768, 12) for _ in range(12))
            self.text = nn.ModuleList(nn.MultiheadAttention(512, 8) for _ in range(12))


# The update


def test_the_arms_of_the_hand_example_are_summed() -> None:
    pair = Pair(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]), 1.0, 0.0, False)
    adapter = RankSplitAdapter(pair, blocks=2)
    assert update(adapter, torch.ones(1, 2), 1).tolist() == [[6.0]]  # (3 - 1) (1 + 2)
    assert adapter.weight(torch.zeros(1, 2)).tolist() == [[2.0, 4.0]]


def test_the_slices_of_the_hand_example_are_summed() -> None:
    pair = Pair(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, -1.0]]), 1.0, 0.0, False)
    adapter = InputSplitAdapter(pair, blocks=2)
    assert update(adapter, torch.ones(1, 2), 1).tolist() == [[2.0]]  # bottleneck [2, 4], 6 - 4
    assert adapter.weight(torch.zeros(1, 2)).tolist() == [[1.0, 1.0]]


def test_the_arms_are_a_lora_whose_blocks_of_a_are_one() -> None:
    a, b, x = numbers(2, 12), numbers(9, 8), numbers(3, 12)
    adapter = RankSplitAdapter(Pair(a, b, 0.5, 0.0, False), blocks=4)
    wanted = 0.5 * x @ torch.cat([a, a, a, a]).t() @ b.t()
    torch.testing.assert_close(update(adapter, x, 9), wanted, rtol=1e-6, atol=1e-6)
    delta = adapter.weight(torch.zeros(9, 12))
    assert torch.linalg.matrix_rank(delta, tol=1e-4) == 2  # r / n = 8 / 4
    torch.testing.assert_close(x @ delta.t(), wanted)


def test_slices_of_the_input_may_change_places() -> None:
    a, b, x = numbers(3, 4), numbers(5, 3), numbers(2, 12)
    adapter = InputSplitAdapter(Pair(a, b, 1.0, 0.0, False), blocks=3)
    first, second, third = x.split(4, dim=1)
    moved = torch.cat([third, first, second], dim=1)
    torch.testing.assert_close(update(adapter, moved, 5), update(adapter, x, 5))
    whole = LoRA(rank=3).build(*site_and_weight(), seeded())
    stir(whole)
    assert not torch.allclose(update(whole, moved, 5), update(whole, x, 5))
    delta = adapter.weight(torch.zeros(5, 12))
    torch.testing.assert_close(delta, torch.cat([b @ a] * 3, dim=1))


def site_and_weight() -> Any:
    site, layer = site_at(nn.Sequential(nn.Linear(12, 5)), "0")
    return site, layer.matrix()


@SPLITS
@pytest.mark.parametrize(("model", "x"), layers())
def test_a_new_set_changes_no_bit_and_its_forms_agree(
    model: nn.Module, x: Tensor, split: Any
) -> None:
    blocks = 3 if x.is_floating_point() else 7  # of 6, 27, 9 inputs, or of an embedding's 7 rows
    recipe = BlockLoRA(rank=blocks if split == "rank" else 2, blocks=blocks, split=split)
    y = model(x)
    made = made_at(model, recipe, "0")
    assert torch.equal(model(x), y)
    stir(made, 1.0)
    adapted = model(x)
    assert not torch.allclose(adapted, y)
    made.merge()
    torch.testing.assert_close(model(x), adapted)
    made.detach()
    assert torch.equal(model(x), y)


@SPLITS
def test_one_block_is_lora_to_the_bit(split: Any) -> None:
    plain, blocked, x = chain(), chain(), numbers(4, 6)
    lora = made_at(plain, LoRA(rank=4, alpha=1, scaling="rank_stabilised"), "{0,2}")
    block = made_at(blocked, BlockLoRA(rank=4, blocks=1, split=split), "{0,2}")
    assert block.trainable_count() == lora.trainable_count() == 2 * 4 * 12
    for made, model in ((lora, plain), (block, blocked)):
        stir(made)
        model(x).square().sum().backward()
    assert torch.equal(blocked(x), plain(x))
    assert lora.state_dict().keys() == block.state_dict().keys()
    for ours, theirs in zip(block.parameters(), lora.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


@SPLITS
@pytest.mark.parametrize(
    ("rank", "blocks", "count"), [(2, 2, 138_240), (8, 8, 414_720), (16, 8, 829_440)]
)
def test_the_counts_on_clip(split: Any, rank: int, blocks: int, count: int) -> None:
    at = ["{vision,text}.*.in_proj_weight[q,k,v]"]
    made = attach(Towers(), BlockLoRA(rank=rank, blocks=blocks, split=split), at)
    assert len(made.sites) == 72
    assert made.trainable_count() == made.stored_count() == count


@SPLITS
def test_the_scale_is_that_of_the_nominal_rank(split: Any) -> None:
    recipe = BlockLoRA(rank=8, blocks=4, split=split)
    model = chain(width=8)
    (adapter,) = made_at(model, recipe.replace(ranks={"0": 4}), "0").adapters.values()
    assert adapter.scale == pytest.approx(0.5)  # 1 / sqrt(4)
    (site,) = select(model, "0")
    assert recipe.scale_of(recipe.rank_at(site)) == pytest.approx(8**-0.5)
    standard = BlockLoRA(rank=8, blocks=4, split=split, scaling="standard", alpha=2)
    assert standard.scale_of(standard.rank_at(site)) == 0.25


def test_the_start_is_that_of_the_plain_lora_at_embeddings_too() -> None:
    recipe = BlockLoRA(rank=8, blocks=4)
    for model in (nn.Sequential(nn.Linear(9, 7)), nn.Sequential(nn.Embedding(9, 7))):
        block = made_at(model, recipe)
        lora = made_at(model, recipe.plain(), name="plain")
        assert all(
            torch.equal(ours, theirs)
            for ours, theirs in zip(
                as_plain(block)[2].values(), lora.state_dict().values(), strict=True
            )
        )
    assert block.adapters["0"].get_parameter("B").std() > 0.1  # the embedding's


def test_factors_are_those_of_the_update() -> None:
    for adapter in (
        RankSplitAdapter(Pair(numbers(2, 6), numbers(5, 6), 0.5, 0.0, False), blocks=3),
        InputSplitAdapter(Pair(numbers(4, 2), numbers(5, 4), 0.5, 0.0, False), blocks=3),
    ):
        assert isinstance(adapter, LowRank)
        a, b, p, scale = adapter.factors()
        assert p is None
        x = numbers(4, 6)
        torch.testing.assert_close(update(adapter, x, 5), scale * F.linear(F.linear(x, a), b))


# What is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 3, "blocks": 2}, "rank 3 cannot be cut into blocks=2: a multiple of 2"),
        ({"rank": 4, "blocks": 2, "ranks": {"0": 3}}, "rank 3 cannot be cut"),
        ({"blocks": 0}, "blocks=0 is not allowed: a whole number from 1"),
        ({"blocks": 1.0}, "blocks=1.0 is not allowed"),
        ({"blocks": True}, "blocks=True is not allowed"),
        ({"split": "output"}, "split='output' is not allowed: rank or input"),
        ({"split": ["rank"]}, r"split=\['rank'\] is not allowed"),
        ({"arm_dropout": 1.0}, r"arm_dropout=1.0 is not in \[0, 1\)"),
        ({"arm_dropout": 0.5, "split": "input"}, "arm_dropout=0.5 needs arms: split='rank'"),
        ({"rank": 0}, "rank 0 is not allowed"),
        ({"scaling": "root"}, "scaling='root' is not allowed: standard or rank_stabilised"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: Any, words: str) -> None:
    with pytest.raises(AdaptError, match=f"^BlockLoRA: {words}"):
        BlockLoRA(**settings)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (BlockLoRA(rank=4, blocks=4, split="input"), "cut the 6 inputs of 0 into blocks=4"),
        (BlockLoRA(rank=14, blocks=2), "rank 7 does not fit 0: .* at most 6"),
        (BlockLoRA(ranks={"9": 4}), "ranks has '9', which fits none"),
    ],
)
def test_sites_that_do_not_fit_are_refused(recipe: BlockLoRA, words: str) -> None:
    model = chain()
    with pytest.raises(AdaptError, match=f"^BlockLoRA: .*{words}"):
        attach(model, recipe, "0")
    assert not any("A" in key for key in model.state_dict())


def test_masks_need_an_input() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    by_weight = select(model, "0", slot="weight")
    with pytest.raises(AdaptError, match=r"arm_dropout=0\.5 cannot act on 0: .*set arm_dropout=0"):
        attach(model, BlockLoRA(arm_dropout=0.5), by_weight)
