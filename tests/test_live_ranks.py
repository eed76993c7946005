"""Live ranks: where they lie, as a table and a picture, and the plain LoRA of them alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import whisper
from torch import Generator, Tensor, nn

from polyadapt.core import AdaLoRA, AdaptError, AdapterSet, BitFit, LoRA, S2LoRA, attach, load
from polyadapt.core.adapters.s2lora import S2LoRAAdapter
from polyadapt.core.live_ranks import RankTable, alive, as_lora, rank_table, ranks
from polyadapt.core.rank_picture import rank_picture
from polyadapt.core.store import save_form
from polyadapt.tests.adalora_cases import adalora
from polyadapt.tests.saved_sets import INPUT, net

LAM = {"blocks.0.mlp": [1.0, 0.0, -0.05], "blocks.1.mlp": [0.0, 0.0, 0.0]}


def pruned(model: nn.Module, lam: dict[str, list[float]] = LAM, alpha: float = 3.0) -> AdapterSet:
    """S2-LoRA with these coefficients and a bank of noise."""
    made = attach(model, S2LoRA(rank=3, alpha=alpha), list(lam), "pets")
    generator = Generator().manual_seed(3)
    with torch.no_grad():
        assert made.bank is not None
        for factor in made.bank.parameters():
            factor.copy_(torch.randn(factor.shape, generator=generator))
        for adapter, own in zip(made.adapters.values(), lam.values(), strict=True):
            assert isinstance(adapter, S2LoRAAdapter)
            adapter.lam.copy_(torch.tensor(own))
    return made


def test_alive_is_above_a_share_of_the_largest_and_above_a_floor() -> None:
    p = torch.tensor([0.0, 1e-7, -0.2, 2.0])
    assert alive(p).tolist() == [False, True, True, True]
    assert alive(p, eps=1e-6).tolist() == [False, False, True, True]
    assert alive(p, tau=0.1).tolist() == [False, False, False, True]
    assert not bool(alive(torch.zeros(3)).any())


@pytest.mark.parametrize(
    ("tau", "eps", "words"),
    [(1.0, 0.0, "tau=1.0 is not allowed"), (-0.1, 0.0, "tau=-0.1"), (0.0, -1.0, "eps=-1.0")],
)
def test_a_threshold_out_of_range_is_refused(tau: float, eps: float, words: str) -> None:
    with pytest.raises(AdaptError, match=words):
        alive(torch.ones(2), tau, eps)


def test_ranks_per_site() -> None:
    made = pruned(net())
    assert ranks(made) == {"blocks.0.mlp": 2, "blocks.1.mlp": 0}
    assert ranks(made, tau=0.1) == {"blocks.0.mlp": 1, "blocks.1.mlp": 0}


def test_methods_without_coefficients_are_refused_by_name() -> None:
    model = net()
    for recipe, at in ((LoRA(rank=2), "blocks.*.mlp"), (BitFit(), None)):
        made = attach(model, recipe, at, type(recipe).__name__)
        for call in (ranks, rank_table, as_lora):
            with pytest.raises(AdaptError, match=f"{made.name}.* has no coefficient per rank"):
                call(made)


# The table and the picture


def test_the_table_groups_by_block_and_kind_of_weight() -> None:
    sizes = (80, 8, 8, 1, 2, 11, 8, 8, 1, 2)
    model = whisper.model.Whisper(whisper.model.ModelDimensions(*sizes))
    made = attach(model, S2LoRA(rank=2, init="lora"), "**.{attn,cross_attn}.{query,value}")
    table = rank_table(made)
    towers = [f"{tower}.blocks.{n}" for tower in ("encoder", "decoder") for n in (0, 1)]
    kinds = ["attn.query", "attn.value", "cross_attn.query", "cross_attn.value"]
    assert (sorted(table.layers), sorted(table.kinds)) == (sorted(towers), kinds)
    assert len(table.live) == 2 * 2 + 2 * 4
    assert {*table.live.values()} == {table.most} == {2}
    assert ("encoder.blocks.0", "cross_attn.query") not in table.live


def test_the_table_has_adaloras_ranks_too_and_sites_outside_of_blocks() -> None:
    made = attach(net(), AdaLoRA(rank=2), "{blocks.1.qkv[v],head}")
    adalora(made)[0].E.data[1] = 1.0
    table = rank_table(made)
    assert (table.layers, table.kinds, table.most) == (("blocks.1", ""), ("qkv[v]", "head"), 3)
    assert dict(table.live) == {("blocks.1", "qkv[v]"): 1, ("", "head"): 0}
    assert str(table) == "        blocks.1\nqkv[v]  1\nhead              0"


def test_the_picture_depends_on_the_ranks_and_on_the_title() -> None:
    def drawn(live: int, title: str = "live ranks") -> bytes:
        return rank_picture(RankTable(("0", "1"), ("q",), {("0", "q"): live}, 4), title)

    assert drawn(3) == drawn(3)
    assert drawn(3)[:8] == b"\x89PNG\r\n\x1a\n"
    assert len({drawn(3), drawn(4), drawn(3, "S2-LoRA on tiny.en")}) == 3


# The plain LoRA


@pytest.mark.parametrize("alpha", [3.0, 5.0])
def test_the_live_ranks_are_a_plain_lora(alpha: float, tmp_path: Path) -> None:
    model, other = net(), net()
    made = pruned(model, alpha=alpha)
    made.extra = {"labels": ["cat", "dog"]}
    recipe, sites, tensors = as_lora(made)
    assert [site.name for site in sites] == ["blocks.0.mlp"]  # the other has no live rank
    assert {key: list(t.shape) for key, t in tensors.items()} == {
        "blocks.0.mlp/A": [2, 8],
        "blocks.0.mlp/B": [8, 2],
    }
    save_form(made, tmp_path / "plain.safetensors", (recipe, sites, tensors))
    plain = load(other, tmp_path / "plain.safetensors")
    torch.testing.assert_close(other(INPUT), model(INPUT), rtol=1e-5, atol=1e-5)
    assert isinstance(plain.recipe, LoRA)
    assert (plain.name, plain.extra) == ("pets", {"labels": ["cat", "dog"]})


def test_tau_cuts_the_small_ones() -> None:
    model, other = net(), net()
    made = pruned(model)
    recipe, sites, tensors = as_lora(made, tau=0.1)
    attach(other, recipe, sites).load_state_dict(tensors)
    assert recipe.rank == 1
    y, z = model(INPUT), other(INPUT)
    assert not torch.allclose(y, z, atol=1e-4)
    with torch.no_grad():
        first = made.adapters["blocks.0.mlp"]
        assert isinstance(first, S2LoRAAdapter)
        first.lam[2] = 0.0
    torch.testing.assert_close(model(INPUT), z, rtol=1e-5, atol=1e-5)


def test_a_set_without_a_live_rank_has_no_plain_form() -> None:
    dead = {name: [0.0] * 3 for name in LAM}
    with pytest.raises(AdaptError, match="'pets' has no live rank"):
        as_lora(pruned(net(), dead))


def test_sites_of_different_ranks_keep_their_own() -> None:
    lam = {"blocks.0.mlp": [1.0, 0.0, 0.0], "blocks.1.mlp": [1.0, -2.0, 3.0]}
    model, other = net(), net()
    recipe, sites, tensors = as_lora(pruned(model, lam))
    assert [recipe.rank_at(site) for site in sites] == [1, 3]
    attach(other, recipe, sites).load_state_dict(tensors)
    y: Tensor = model(INPUT)
    torch.testing.assert_close(other(INPUT), y, rtol=1e-5, atol=1e-5)
