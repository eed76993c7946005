"""Patterns against backbones: which sites, by which slot and why, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import AdaptError, FullFineTuning, LoRA, Site, activate, attach, select
from polyadapt.core.errors import SiteError
from polyadapt.core.kinds import layer_at
from polyadapt.core.sites import Sites


class Attention(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.drop = nn.Dropout(0.1)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        y: Tensor = self.proj(self.drop(torch.softmax(q @ k.mT, -1) @ v))
        return y


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.act(self.attn(self.norm(x)))
        return y


class Model(nn.Module):
    def __init__(self, depth: int = 2, width: int = 4) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.embed = nn.Embedding(7, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.proj = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(self.blocks(self.embed(x) + self.token))
        return y


class Conv1D(nn.Module):
    """The storage of transformers' layer of this name: [d_in, d_out], and `nf`."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.nf = d_out
        self.weight = nn.Parameter(torch.randn(d_in, d_out))
        self.bias = nn.Parameter(torch.zeros(d_out))


def names(sites: Sites) -> list[str]:
    return [site.name for site in sites]


def refusal(ask: Callable[[], object]) -> str:
    """The one line of a refused selection."""
    with pytest.raises(SiteError) as refused:
        ask()
    line = str(refused.value)
    assert "\n" not in line
    return line


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


# ---- the slot


def test_a_called_layer_can_be_reached_by_its_weight_when_asked() -> None:
    (site,) = select(Model(depth=1), "attn.proj", slot="weight")
    assert (site.slot, site.why, site.readers) == ("weight", "asked for", ("blocks.0.attn.proj",))


def test_both_slots_give_the_same_output() -> None:
    model, x = Model().eval(), torch.tensor([[0, 3, 6]])
    outputs = {}
    for slot in ("output", "weight"):
        sites = select(model, "blocks.*.attn.qkv[q,v]", slot=slot)
        made = attach(model, LoRA(rank=2), sites, generator=torch.Generator().manual_seed(0))
        for adapter in made.adapters.values():
            nn.init.constant_(adapter.get_parameter("B"), 0.5)
        outputs[slot] = model(x)
        made.detach()
    assert not torch.equal(outputs["output"], model(x))
    torch.testing.assert_close(outputs["output"], outputs["weight"])


@pytest.mark.parametrize(
    ("pattern", "slot", "complaint"),
    [
        ("norm.bias", "output", "norm.bias can only take the weight slot: LayerNorm holds"),
        ("blocks.0", "weight", "blocks.0 can only take the output slot: a whole module"),
        ("proj", "input", "slot='input' is not allowed: weight or output"),
    ],
)
def test_a_slot_that_a_site_cannot_have_is_refused(pattern: str, slot: str, complaint: str) -> None:
    line = refusal(lambda: select(Model(depth=1), pattern, slot=slot))  # type: ignore[arg-type]
    assert complaint in line


def test_an_embedding_that_writes_into_its_table_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=1.0))
    assert "max_norm, which writes into the frozen table" in refusal(lambda: select(model, "0"))


class ReadsOnlyTheDtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.to(self.fc.weight.dtype))
        return y


class ReadsTheWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.fc.weight


class InitialisesTheWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y


@pytest.mark.parametrize(
    ("owner", "slot"),
    [(ReadsTheWeight, "weight"), (ReadsOnlyTheDtype, "output"), (InitialisesTheWeight, "output")],
)
def test_a_weight_that_its_owner_reads_takes_the_weight_slot(
    owner: type[nn.Module], slot: str
) -> None:
    (site,) = select(nn.Sequential(owner()), "0.fc")
    assert site.slot == slot
    if slot == "weight":
        assert site.why == "ReadsTheWeight reads fc.weight itself"
        assert site.readers == ("0.fc", "0")


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


# ---- real classes


def check(model: nn.Module, wanted: dict[str, tuple[str, str, str]]) -> None:
    """pattern -> (kind, slot, why) of every site that it finds."""
    for pattern, (kind, slot, why) in wanted.items():
        sites = select(model, pattern)
        assert {(s.kind, s.slot, s.why) for s in sites} == {(kind, slot, why)}, pattern


CALLED = "the layer is called"


def acts(model: nn.Module, at: list[str], run: Callable[[], object]) -> None:
    """The chosen slots act, in eval: one backward reaches every adapter."""
    made = attach(model.eval(), LoRA(rank=1), at, probe=run)
    assert len(made.sites) >= len(at)
    made.detach()


def test_timm_vit() -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3
    )
    check(
        model,
        {
            "blocks.*.attn.qkv[q,k,v]": ("linear", "output", CALLED),
            "blocks.*.attn.proj": ("linear", "output", CALLED),
            "blocks.*.mlp.fc{1,2}": ("linear", "output", CALLED),
            "head": ("linear", "output", CALLED),
            "patch_embed.proj": ("conv2d", "weight", "PatchEmbed reads proj.weight itself"),
            "blocks.*": ("block", "output", "a whole module"),
            "pos_embed": (
                "parameter",
                "weight",
                "VisionTransformer holds the parameter itself",
            ),
        },
    )
    assert [s.shape for s in select(model, "blocks.*")] == [(16,), (16,)]
    at = ["blocks.*.attn.qkv[q,v]", "blocks.*.mlp.fc1", "patch_embed.proj", "head"]
    acts(model, at, lambda: model(torch.randn(1, 3, 16, 16)))


def test_timm_swin() -> None:
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        img_size=32, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4
    )
    attention = "layers.*.blocks.*.attn"
    check(
        model,
        {
            f"{attention}.qkv[q,v]": ("linear", "output", CALLED),
            f"{attention}.relative_position_bias_table": (
                "parameter",
                "weight",
                "WindowAttention holds the parameter itself",
            ),
            "layers.1.downsample.reduction": ("linear", "output", CALLED),
        },
    )
    assert [s.shape for s in select(model, "layers.*.blocks.*")] == [(8,), (16,)]
    assert [s.shape for s in select(model, f"{attention}.qkv[v]")] == [(8, 8), (16, 16)]
    at = [f"{attention}.qkv[q,v]", "layers.1.downsample.reduction"]
    acts(model, at, lambda: model(torch.randn(1, 3, 32, 32)))


def test_timm_swin_v2_reads_its_fused_projection_itself() -> None:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    model = SwinTransformerV2(
        img_size=16, patch_size=4, embed_dim=8, depths=(1,), num_heads=(1,), window_size=4
    )
    gain = model.get_parameter("layers.0.blocks.0.norm1.weight")
    nn.init.ones_(gain)  # 0 at first: nothing below it acts
    why = "WindowAttention reads qkv.weight itself"
    check(model, {"attn.qkv[q,v]": ("linear", "weight", why)})
    acts(model, ["attn.qkv[q,v]"], lambda: model(torch.randn(1, 3, 16, 16)))


def test_open_clip_vit() -> None:
    from open_clip.transformer import VisionTransformer

    model = VisionTransformer(
        image_size=16, patch_size=8, width=16, layers=2, heads=2, mlp_ratio=2.0, output_dim=8
    )
    holds = "MultiheadAttention holds the parameter itself"
    reads = "MultiheadAttention reads out_proj.weight itself"
    check(
        model,
        {
            "resblocks.*.attn.in_proj_weight[q,k,v]": ("parameter", "weight", holds),
            "resblocks.*.attn.in_proj_bias[q,v]": ("parameter", "weight", holds),
            "resblocks.*.attn.out_proj": ("linear", "weight", reads),
            "resblocks.*.mlp.c_fc": ("linear", "output", CALLED),  # only its dtype is read
            "resblocks.*.mlp.c_proj": ("linear", "output", CALLED),
            "conv1": ("conv2d", "output", CALLED),
        },
    )
    at = ["resblocks.*.attn.in_proj_weight[q,v]", "out_proj", "c_fc", "conv1"]
    acts(model, at, lambda: model(torch.randn(1, 3, 16, 16)))


def test_gpt2() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    check(
        model,
        {
            "h.*.attn.c_attn[q,k,v]": ("transposed linear", "output", CALLED),
            "h.*.mlp.{c_fc,c_proj}": ("transposed linear", "output", CALLED),
            "wpe": ("embedding", "output", CALLED),
            "h.*": ("block", "output", "a whole module"),
        },
    )
    for pattern in ("wte", "lm_head"):
        line = refusal(lambda pattern=pattern: select(model, pattern))  # type: ignore[misc]
        assert "one weight as transformer.wte.weight and lm_head.weight" in line
    ids = torch.arange(6)[None]
    acts(model, ["h.*.attn.c_attn[q,v]", "h.*.mlp.c_fc"], lambda: model(ids).logits)


def test_whisper() -> None:
    from whisper.model import ModelDimensions, Whisper

    model = Whisper(
        ModelDimensions(
            n_mels=4,
            n_audio_ctx=4,
            n_audio_state=8,
            n_audio_head=2,
            n_audio_layer=1,
            n_vocab=11,
            n_text_ctx=8,
            n_text_state=8,
            n_text_head=2,
            n_text_layer=1,
        )
    )
    check(
        model,
        {
            "decoder.blocks.*.{attn,cross_attn}.{query,key,value,out}": (
                "linear",
                "output",
                CALLED,
            ),
            "encoder.conv{1,2}": ("conv1d", "output", CALLED),
            "decoder.blocks.*.mlp.0": ("linear", "output", CALLED),
            "decoder.token_embedding": (
                "embedding",
                "weight",
                "TextDecoder reads token_embedding.weight itself",  # for its tied logits
            ),
        },
    )
    nn.init.normal_(model.decoder.positional_embedding)
    at = ["blocks.*.{attn,cross_attn}.{query,value}", "conv1", "decoder.token_embedding"]
    acts(model, at, lambda: model(torch.randn(1, 4, 8), torch.tensor([[1, 2, 3]])))


def test_whisper_of_transformers() -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=20,
        num_mel_bins=4,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_source_positions=4,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    model = WhisperForConditionalGeneration(config)
    check(
        model,
        {
            "layers.*.{self_attn,encoder_attn}.{q,v}_proj": ("linear", "output", CALLED),
            "encoder.conv1": ("conv1d", "output", CALLED),
        },
    )
    assert "is tied" in refusal(lambda: select(model, "proj_out"))


def test_multihead_attention() -> None:
    model = nn.MultiheadAttention(8, 2)
    holds = "MultiheadAttention holds the parameter itself"
    check(
        model,
        {
            "in_proj_weight[q,k,v]": ("parameter", "weight", holds),
            "out_proj": (
                "linear",
                "weight",
                "MultiheadAttention reads out_proj.weight itself",
            ),
        },
    )
    assert names(select(model, "in_proj_weight[v]")) == ["in_proj_weight[v]"]
    x = torch.randn(3, 1, 8)
    acts(model, ["in_proj_weight[q,v]", "out_proj"], lambda: model(x, x, x))


def test_multihead_attention_with_projections_of_its_own() -> None:
    model = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
    assert [s.shape for s in select(model, "{q,k,v}_proj_weight")] == [(8, 8), (8, 4), (8, 4)]
    assert "nothing in MultiheadAttention is called 'in_proj_weight'" in refusal(
        lambda: select(model, "in_proj_weight[q]")
    )


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder_layer(batch_first: bool) -> None:
    """In eval its fast path reads every weight and calls no child."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    for name in ("self_attn.in_proj_weight", "linear1", "linear2"):
        (site,) = select(layer, name)
        attribute = name if "." in name else f"{name}.weight"
        assert (site.slot, site.why) == (
            "weight",
            f"TransformerEncoderLayer reads {attribute} itself",
        )
    (out,) = select(layer, "self_attn.out_proj")
    assert (out.slot, out.why) == ("weight", "MultiheadAttention reads out_proj.weight itself")
    assert out.readers == ("self_attn.out_proj", "self_attn", "")
    at = ["self_attn.in_proj_weight[q,v]", "self_attn.out_proj", "linear{1,2}"]
    acts(layer, at, lambda: layer(torch.randn(2, 3, 8)))


def test_recurrent_weights_act_although_the_layer_keeps_a_list_of_them() -> None:
    model = nn.LSTM(3, 3)
    acts(model, ["weight_ih_l0", "weight_hh_l0"], lambda: model(torch.randn(4, 2, 3))[0])


def test_sites_can_be_hashed_and_compared() -> None:
    model = Model()
    assert set(select(model, "attn.qkv")) == set(select(model, "blocks.*.attn.qkv"))
    assert isinstance(select(model, "proj")[0], Site)
