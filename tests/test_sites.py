"""Patterns against backbones: which sites they find."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polyadapt.core import AdaptError, LoRA, attach, select
from polyadapt.core.kinds import layer_at
from polyadapt.core.sites import Sites
from polyadapt.tests.law_models import Conv1D
from polyadapt.tests.site_models import Model, names, refusal

# ---- the table


def test_the_table_of_a_small_model_is_exactly_this() -> None:
    sites = select(Model(depth=1), ["blocks.*", "blocks.*.attn.qkv[q,v]", "embed", "norm.bias"])
    assert str(sites).splitlines() == [
        "site                  shape  kind       slot    why",
        "blocks.0              4      block      output  a whole module",
        "blocks.0.attn.qkv[q]  4x4    linear     output  the layer is called",
        "blocks.0.attn.qkv[v]  4x4    linear     output  the layer is called",
        "embed                 4x7    embedding  output  the layer is called",
        "blocks.0.norm.bias    4      parameter  weight  LayerNorm holds the parameter itself",
    ]


def test_sites_come_in_the_order_they_are_asked_for_and_layers_in_the_backbones() -> None:
    assert names(select(Model(), ["proj", "blocks.*.attn.qkv", "blocks.{1,0}.norm"])) == [
        "proj",
        "blocks.0.attn.qkv",
        "blocks.1.attn.qkv",
        "blocks.1.norm",
        "blocks.0.norm",
    ]


def test_a_part_is_rows_of_its_layer() -> None:
    q, v = select(Model(depth=1), "qkv[q,v]")
    assert (q.rows, q.part, q.shape) == ((0, 4), "q", (4, 4))
    assert (v.rows, v.part, v.shape) == ((8, 12), "v", (4, 4))
    model = Model(depth=1)
    here = layer_at(model, v).matrix()
    assert torch.equal(here, model.get_parameter("blocks.0.attn.qkv.weight")[8:])


# ---- what a pattern finds


def test_a_whole_path_comes_before_a_tail() -> None:
    assert names(select(Model(), "proj")) == ["proj"]  # not blocks.0.attn.proj as well
    assert names(select(Model(), "attn.proj")) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]


def test_a_tail_finds_a_backbone_that_is_wrapped() -> None:
    wrapped = nn.ModuleDict({"encoder": Model(depth=1)})
    assert names(select(wrapped, "blocks.*.attn.proj")) == ["encoder.blocks.0.attn.proj"]


def test_wildcards_pass_over_modules_without_a_parameter() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.GELU(), nn.Linear(2, 2))
    assert names(select(model, "*")) == ["0", "3"]
    assert names(select(Model(depth=1), "blocks.0.*")) == ["blocks.0.norm", "blocks.0.attn"]


def test_a_last_double_star_means_every_parameter_below() -> None:
    model = Model(depth=1)
    below = [f"blocks.{name}" for name, _ in model.blocks.named_parameters()]
    found = select(model, "blocks.**")
    assert [f"{site.path}.{site.parameter}" for site in found] == below
    assert len(select(model, "**")) == len(list(model.parameters()))


def test_modules_are_found_before_parameters() -> None:
    assert names(select(Model(depth=1), "blocks.*.norm")) == ["blocks.0.norm"]
    assert names(select(Model(depth=1), "blocks.*.norm.*")) == [
        "blocks.0.norm.weight",
        "blocks.0.norm.bias",
    ]


def test_the_weight_of_a_layer_goes_by_the_name_of_the_layer() -> None:
    (by_layer,) = select(Model(depth=1), "attn.proj")
    (by_parameter,) = select(Model(depth=1), "attn.proj.weight")
    assert by_layer == by_parameter


def test_the_weight_of_a_norm_needs_its_own_name() -> None:
    (gain,) = select(Model(depth=1), "norm.weight")
    assert (gain.name, gain.kind, gain.shape) == ("blocks.0.norm.weight", "parameter", (4,))


def test_a_name_twice_within_one_pattern_is_one_site() -> None:
    assert names(select(Model(depth=1), "blocks.{0,*}.attn.qkv[q,q]")) == ["blocks.0.attn.qkv[q]"]


def test_a_backbone_that_is_one_layer_can_be_named() -> None:
    model = nn.Linear(3, 2)
    assert names(select(model, ["weight", "bias"])) == ["weight", "bias"]


def test_every_site_is_found_again_by_its_name_alone() -> None:
    model = Model()
    for site in (*select(model, "**"), *select(model, ["qkv[q,k,v]", "qkv.bias[k]", "blocks.*"])):
        assert select(model, site.name) == (site,)


@pytest.mark.parametrize(
    ("layer", "kind", "shape", "slot"),
    [
        (nn.Linear(5, 3), "linear", (3, 5), "output"),
        (Conv1D(5, 3), "transposed linear", (3, 5), "output"),
        (nn.Conv1d(4, 6, 3), "conv1d", (6, 12), "output"),
        (nn.Conv2d(4, 6, (3, 2)), "conv2d", (6, 24), "output"),
        (nn.Conv2d(4, 6, 3, groups=2), "conv2d", (6, 18), "weight"),
        (nn.Embedding(11, 3), "embedding", (3, 11), "output"),
        (nn.LayerNorm(3), "block", (3,), "output"),
    ],
)
def test_the_shape_of_a_site_is_that_of_its_linear_map(
    layer: nn.Module, kind: str, shape: tuple[int, ...], slot: str
) -> None:
    (site,) = select(nn.Sequential(layer), "0")
    assert (site.kind, site.shape, site.slot) == (kind, shape, slot)


def test_the_width_of_a_block_is_what_its_last_layer_returns() -> None:
    block = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))
    assert select(nn.Sequential(block), "0")[0].shape == (4,)
    assert select(nn.Sequential(nn.Sequential(nn.Linear(4, 16), nn.GELU())), "0")[0].shape == (16,)


# ---- sites that were selected before


def test_selected_sites_can_be_attached_as_they_are() -> None:
    model = Model()
    sites = select(model, "blocks.*.attn.qkv[q]", slot="weight")
    assert select(model, sites) == sites
    assert attach(model, LoRA(rank=2), sites).sites == sites


def test_sites_are_looked_up_in_the_model_they_are_used_on() -> None:
    sites = select(Model(depth=3), "blocks.*.attn.qkv")
    assert select(Model(depth=3), sites) == sites
    line = refusal(lambda: select(Model(depth=2), sites))
    assert "nothing in Model is called 'blocks.2.attn.qkv'" in line


def test_sites_of_a_model_of_another_width_are_refused() -> None:
    line = refusal(lambda: attach(Model(width=8), LoRA(rank=2), select(Model(), "attn.proj")))
    assert line == ("blocks.0.attn.proj was a linear [4, 4], in this Model it is a linear [8, 8]")


def test_sites_of_a_model_of_other_layers_are_refused() -> None:
    sites = select(nn.Sequential(nn.Linear(4, 4)), "0")
    assert "is a transposed linear" in refusal(lambda: select(nn.Sequential(Conv1D(4, 4)), sites))


def test_sites_put_together_by_hand_may_not_overlap() -> None:
    model = Model(depth=1)
    whole, part = select(model, "attn.qkv"), select(model, "attn.qkv[q]")
    assert "the same weight" in refusal(lambda: select(model, Sites((*whole, *part))))


def test_a_slot_may_be_asked_of_selected_sites() -> None:
    model = Model(depth=1)
    assert select(model, select(model, "attn.proj"), slot="weight")[0].slot == "weight"


# ---- adapters are no part of the backbone


def test_attached_adapters_are_not_found_by_patterns() -> None:
    model = Model(depth=1)
    before = select(model, "**")
    attach(model, LoRA(rank=2), at="attn.qkv")
    assert select(model, "**") == before
    assert "nothing in Model" in refusal(lambda: select(model, "polyadapt_drawer.**"))


def test_adapters_of_a_part_are_not_found_from_the_whole() -> None:
    whole = nn.ModuleDict({"vision": Model(depth=1), "text": nn.Linear(4, 4)})
    before = names(select(whole, "**"))
    attach(whole["vision"], LoRA(rank=2), at="attn.qkv")
    assert names(select(whole, "**")) == before


def test_a_refused_attachment_changes_nothing() -> None:
    model = Model()
    state = [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdaptError):
        attach(model, LoRA(rank=2), at="blocks.{0,7}.attn.qkv")
    assert [p.requires_grad for p in model.parameters()] == state
    assert "polyadapt_drawer" not in dict(model.named_children())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_layer_without_a_shape_yet_does_not_stand_in_the_way_of_another() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    adapters = attach(model, LoRA(rank=1), at="0")
    assert model(torch.ones(1, 4)).requires_grad
    assert not model[1].weight.requires_grad
    adapters.detach()
    assert all(p.requires_grad for p in model.parameters())
