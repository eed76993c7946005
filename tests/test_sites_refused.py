"""Patterns that name nothing, one weight twice, or what cannot be adapted."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from polyadapt.core import AdaptError, FullFineTuning, LoRA, activate, attach, select
from polyadapt.core.kinds import layer_at
from polyadapt.tests.law_models import Conv1D
from polyadapt.tests.site_models import Model, names, refusal

# ---- what finds nothing


def test_a_pattern_that_finds_nothing_names_the_nearest() -> None:
    line = refusal(lambda: select(Model(), "blocks.*.attn.qvk"))
    assert line == (
        "pattern 'blocks.*.attn.qvk': nothing in Model is called 'blocks.*.attn.qvk';"
        " nearest: blocks.*.attn.qkv, blocks.*.attn, blocks.*.attn.qkv.bias"
    )


def test_a_pattern_that_resembles_nothing_says_so() -> None:
    assert refusal(lambda: select(Model(), "zzzzz")).endswith("nearest: none")


@pytest.mark.parametrize(
    ("pattern", "idle"),
    [
        ("blocks.{0,9}.attn.qkv", "blocks.9.attn.qkv"),
        ("blocks.*.attn.{qkv,poj}", "blocks.*.attn.poj"),
        ("blocks.{0,1}.{attn.qkv,mlp}", "blocks.0.mlp"),
    ],
)
def test_each_alternative_must_find_something(pattern: str, idle: str) -> None:
    line = refusal(lambda: select(Model(), pattern))
    assert f"nothing in Model is called {idle!r}" in line


def test_an_alternative_needs_no_success_in_every_combination() -> None:
    """An encoder may have what a decoder lacks: `{enc,dec}.{self,cross}` has only three hits."""
    enc, dec = nn.ModuleDict(), nn.ModuleDict()
    enc["self"] = nn.Linear(2, 2)
    dec["self"], dec["cross"] = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"enc": enc, "dec": dec})
    assert names(select(model, "{enc,dec}.{self,cross}")) == ["enc.self", "dec.self", "dec.cross"]


def test_a_module_without_a_parameter_is_no_site() -> None:
    assert "nothing in Model is called 'blocks.0.act'" in refusal(
        lambda: select(Model(), "blocks.0.act")
    )


@pytest.mark.parametrize("at", [3, None, nn.Linear(2, 2)])
def test_what_is_no_pattern_is_refused(at: object) -> None:
    assert "sites are a pattern" in refusal(lambda: select(Model(), at))  # type: ignore[arg-type]


def test_a_list_with_something_else_in_it_is_refused() -> None:
    assert "must be text" in refusal(lambda: select(Model(), ["proj", None]))  # type: ignore[list-item]
    assert "not Linear" in refusal(lambda: select(Model(), nn.Sequential(nn.Linear(2, 2))))  # type: ignore[arg-type]


# ---- the same weight twice


@pytest.mark.parametrize(
    "patterns",
    [
        ["proj", "p*j"],
        ["attn.qkv", "attn.qkv[q]"],
        ["attn.qkv[q,k]", "attn.qkv[k,v]"],
        ["blocks.*.norm.bias", "blocks.**"],
        ["blocks.0", "blocks.*"],
    ],
)
def test_a_weight_named_by_two_patterns_is_refused(patterns: list[str]) -> None:
    assert "names the same weight as" in refusal(lambda: select(Model(), patterns))


def test_overlapping_rows_are_refused_by_the_names_of_both() -> None:
    line = refusal(lambda: select(Model(depth=1), ["attn.qkv[v]", "attn.qkv"]))
    assert "blocks.0.attn.qkv names the same weight as blocks.0.attn.qkv[v]" in line


def test_different_parts_of_one_weight_may_come_from_two_patterns() -> None:
    assert len(select(Model(depth=1), ["attn.qkv[q]", "attn.qkv[v]", "attn.qkv.bias[q]"])) == 3


# ---- parts


def test_parts_of_a_layer_that_is_not_fused_are_refused() -> None:
    line = refusal(lambda: select(Model(depth=1), "attn.proj[q,v]"))
    assert "blocks.0.attn.proj is not a fused projection that we know (qkv, " in line
    assert line.endswith("leave out [q,v]")


def test_a_part_that_does_not_exist_is_refused() -> None:
    line = refusal(lambda: select(Model(depth=1), "attn.qkv[q,w]"))
    assert "blocks.0.attn.qkv has parts q,k,v, not 'w'" in line


def test_a_whole_module_has_no_parts() -> None:
    assert "blocks.0 is a whole module and has no parts" in refusal(
        lambda: select(Model(depth=1), "blocks.0[q]")
    )


def test_rows_that_do_not_divide_into_the_parts_are_refused() -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(4, 10)})
    assert "not a fused projection" in refusal(lambda: select(model, "qkv[q]"))


def test_parts_of_a_projection_that_lies_head_by_head_are_refused() -> None:
    """timm's TinyViT: rows 0 to 4 are q, k, v of the first head, not q of all."""
    from timm.models.tiny_vit import Attention

    model = nn.ModuleDict({"attn": Attention(dim=8, key_dim=4, num_heads=2, attn_ratio=1)})
    assert refusal(lambda: select(model, "attn.qkv[q,v]")) == (
        "pattern 'attn.qkv[q,v]': attn.qkv of timm.models.tiny_vit.Attention keeps q, k, v of each"
        " head together, so it has no parts: leave out [q,v]"
    )
    assert names(select(model, "attn.qkv")) == ["attn.qkv"]


def test_keys_and_values_of_cross_attention_share_a_projection() -> None:
    """GPT-2's cross-attention: `c_attn` holds k and v, twice its input wide."""
    model = nn.ModuleDict({"c_attn": Conv1D(4, 8)})
    k, v = select(model, "c_attn[k,v]")
    assert (k.rows, v.rows) == ((0, 4), (4, 8))
    assert "has parts k,v, not 'q'" in refusal(lambda: select(model, "c_attn[q]"))


def test_a_transposed_projection_has_its_parts_in_columns() -> None:
    layer = Conv1D(4, 12)
    (k,) = select(nn.ModuleDict({"c_attn": layer}), "c_attn[k]")
    assert k.shape == (4, 4)
    here = layer_at(nn.ModuleDict({"c_attn": layer}), k).matrix()
    assert torch.equal(here, layer.weight[:, 4:8].T)


# ---- tied weights


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "body": nn.Linear(4, 4)})
    model["head"] = nn.Linear(4, 7, bias=False)
    model["head"].weight = model["embed"].weight
    return model


@pytest.mark.parametrize("pattern", ["embed", "head", "embed.weight", "{embed,body}"])
def test_a_tied_weight_is_refused_by_both_names(pattern: str) -> None:
    line = refusal(lambda: select(tied(), pattern))
    assert "is tied: the backbone holds one weight as embed.weight and head.weight" in line


def test_the_other_weights_of_a_model_with_tied_ones_are_free() -> None:
    assert names(select(tied(), ["body", "body.bias"])) == ["body", "body.bias"]


def test_a_module_that_is_used_twice_is_tied_with_itself() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.GELU(), layer)
    assert "one weight as 0.weight and 2.weight" in refusal(lambda: select(model, "0"))


def test_two_parameters_over_one_memory_are_tied() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = nn.Parameter(a.weight.detach())  # another Parameter, the same numbers in memory
    assert "is tied" in refusal(lambda: select(nn.Sequential(a, b), "1"))


def test_weights_on_the_meta_device_are_not_all_tied() -> None:
    with torch.device("meta"):
        model = Model()
    assert len(select(model, "blocks.*.attn.qkv")) == 2


def test_weights_that_are_equal_are_not_tied() -> None:
    a = nn.Linear(4, 4)
    assert names(select(nn.Sequential(a, copy.deepcopy(a)), "*")) == ["0", "1"]


# ---- weights that are computed


@pytest.mark.parametrize(
    "parametrised",
    [
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: nn.utils.parametrizations.orthogonal(layer),
        lambda layer: nn.utils.spectral_norm(layer),
    ],
)
def test_a_weight_that_torch_computes_is_refused_by_name(
    parametrised: Callable[[nn.Module], nn.Module],
) -> None:
    model = nn.Sequential(parametrised(nn.Linear(4, 4)))
    line = refusal(lambda: select(model, "0"))
    assert "0.weight is no stored parameter" in line
    assert "weight_norm and other parametrizations compute theirs: remove them first" in line


def test_what_a_computed_weight_is_made_from_can_be_adapted() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model, x = nn.Sequential(layer), torch.ones(1, 4)
    before = model(x)
    made = attach(model, FullFineTuning(), at="original0")  # the magnitudes
    assert torch.equal(model(x), before)
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(model(x), layer.bias.expand(1, 4))
    with activate(model, None):
        assert torch.equal(model(x), before)


def test_a_block_around_a_computed_weight_has_a_width() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    assert select(nn.Sequential(nn.Sequential(layer)), "0")[0].shape == (6,)


def test_a_layer_that_has_no_shape_yet_is_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    assert "0.weight has no shape yet: run the model once" in refusal(lambda: select(model, "0"))


def test_an_empty_list_of_patterns_is_refused() -> None:
    with pytest.raises(AdaptError, match="at names no sites"):
        attach(nn.Sequential(nn.Linear(4, 4)), LoRA(rank=2), at=[])
