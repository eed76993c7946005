"""Sites of the attention projections, by tower, part and layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import nn

from polyadapt.core import select
from polyadapt.core.errors import AdaptError
from polyadapt.tests.vlm_models import KINDS, clip, timm_and_bert, transformers_siglip
from polyadapt.vlm.names import Encoder, Layers, encoder_of, sites_for
from polyadapt.vlm.split import split_attention

BLOCKS = {
    "CLIP": ("visual.transformer.resblocks.*.attn", "transformer.resblocks.*.attn"),
    "CLIP, open_clip's attention": (
        "visual.transformer.resblocks.*.attn",
        "transformer.resblocks.*.attn",
    ),
    "CustomTextCLIP": (
        "visual.transformer.resblocks.*.attn",
        "text.transformer.resblocks.*.attn",
    ),
    "transformers CLIP": (
        "vision_model.encoder.layers.*.self_attn",
        "text_model.encoder.layers.*.self_attn",
    ),
    "transformers SigLIP": (
        "vision_model.encoder.layers.*.self_attn",
        "text_model.encoder.layers.*.self_attn",
    ),
}


def _names(model: nn.Module, at: Sequence[str]) -> list[str]:
    return [site.name for site in select(model, at)]


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("part", ["q", "k", "v", "o"])
def test_each_projection_of_either_tower_can_be_had_alone(kind: str, part: str) -> None:
    model = KINDS[kind]()
    split_attention(model)
    name = "out_proj" if part == "o" else f"{part}_proj"
    for encoder, blocks in zip(("vision", "text"), BLOCKS[kind], strict=True):
        found = _names(model, sites_for(model, encoder, [part]))  # type: ignore[arg-type]
        assert found == [f"{blocks.replace('*', str(n))}.{name}" for n in range(2)]


def test_an_unsplit_tower_has_parts_of_its_in_projection() -> None:
    model = clip()
    assert _names(model, sites_for(model, "text", ("q", "v"), "half-up")) == [
        "transformer.resblocks.1.attn.in_proj_weight[q]",
        "transformer.resblocks.1.attn.in_proj_weight[v]",
    ]
    assert _names(model, sites_for(model, "vision", "o", "half-bottom")) == [
        "visual.transformer.resblocks.0.attn.out_proj"
    ]


def test_towers_of_timm_and_hugging_face_have_their_own_names() -> None:
    model = timm_and_bert()
    assert sites_for(model, parts="kvo", layers="half-up") == [
        "visual.trunk.blocks.{3,4,5}.attn.qkv[k,v]",
        "visual.trunk.blocks.{3,4,5}.attn.proj",
        "text.transformer.encoder.layer.{1}.attention.{self.key,self.value,output.dense}",
    ]
    assert len(select(model, sites_for(model, parts="kvo", layers="half-up"))) == 3 * 3 + 3


def _eva() -> nn.Module:
    from timm.models.eva import Eva

    size: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2}
    return Eva(**size, num_heads=2, qkv_fused=False, num_classes=0)


def _swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    size: dict[str, Any] = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 1)}
    return SwinTransformer(**size, num_heads=(2, 2), num_classes=0)


def _mt5() -> nn.Module:
    from transformers import MT5Config, MT5EncoderModel

    config = MT5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    encoder: nn.Module = MT5EncoderModel(config).encoder
    return encoder


def _m2m_100() -> nn.Module:
    from transformers import M2M100Config
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

    size: dict[str, Any] = {"encoder_layers": 2, "encoder_attention_heads": 2, "d_model": 8}
    return M2M100Encoder(M2M100Config(vocab_size=9, encoder_ffn_dim=8, **size))


@pytest.mark.parametrize(
    ("encoder", "tower", "names"),
    [
        ("vision", _eva, ["blocks.{n}.attn.q_proj", "blocks.{n}.attn.proj"]),
        ("vision", _swin, ["layers.{n}.blocks.0.attn.qkv[q]", "layers.{n}.blocks.0.attn.proj"]),
        ("text", _mt5, ["block.{n}.layer.0.SelfAttention.q", "block.{n}.layer.0.SelfAttention.o"]),
        ("text", _m2m_100, ["layers.{n}.self_attn.q_proj", "layers.{n}.self_attn.out_proj"]),
    ],
)
def test_other_towers_that_open_clip_can_hold_are_known(
    encoder: Encoder, tower: Callable[[], nn.Module], names: Sequence[str]
) -> None:
    model = nn.Module()
    model.add_module("visual" if encoder == "vision" else "text", tower())
    found = set(_names(model, sites_for(model, encoder, "qo")))
    root = "visual" if encoder == "vision" else "text"
    assert found == {f"{root}.{name.format(n=n)}" for n in range(2) for name in names}


def test_both_encoders_are_the_default_and_output_projections_are_not() -> None:
    model = clip()
    split_attention(model)
    names = _names(model, sites_for(model))
    assert len(names) == 2 * 2 * 3
    assert [encoder_of(name) for name in names] == ["vision"] * 6 + ["text"] * 6
    assert not any("out_proj" in name for name in names)


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ("all", range(12)),
        ("bottom", range(4)),
        ("mid", range(4, 8)),
        ("up", range(8, 12)),
        ("half-bottom", range(6)),
        ("half-up", range(6, 12)),
        ("top3", range(9, 12)),
    ],
)
def test_the_presets_of_twelve_layers_are_those_of_clip_lora(
    layers: Layers, numbers: range
) -> None:
    model = clip(layers=12, width=4, head_width=4)
    (pattern,) = sites_for(model, "vision", "q", layers)
    wanted = ",".join(map(str, numbers))
    assert pattern == f"visual.transformer.resblocks.{{{wanted}}}.attn.in_proj_weight[q]"


def test_poolers_are_no_layers() -> None:
    model = clip(attentional_pool=True, attn_pooler_queries=2, attn_pooler_heads=2)
    assert len(select(model, sites_for(model, "vision"))) == 2 * 3
    siglip = transformers_siglip()
    assert not any("head" in name for name in _names(siglip, sites_for(siglip)))


def test_a_resnet_has_its_pooler_alone() -> None:
    model = clip(layers=(1, 1, 1, 1), width=4, head_width=8)
    assert sites_for(model, "vision", "qvo") == ["visual.attnpool.{q_proj,v_proj,c_proj}"]
    assert {site.slot for site in select(model, sites_for(model, "vision"))} == {"weight"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"encoder": "image"}, "encoder='image' is not allowed: both, text, vision"),
        ({"parts": ("q", "x")}, "parts='x' is not allowed: q, k, v, o"),
        ({"parts": ()}, "parts name at least one of q, k, v, o"),
        ({"layers": "top"}, "layers='top' is not allowed: all, bottom, mid, up, half-up,"),
        ({"layers": "bottom"}, "layers='bottom' is not allowed here: the vision tower has only 2"),
    ],
)
def test_other_words_are_refused_with_those_that_are_allowed(
    asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdaptError) as error:
        sites_for(clip(), **asked)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_model_or_tower_without_attention_is_refused() -> None:
    with pytest.raises(AdaptError, match="Linear has no vision tower that we know"):
        sites_for(nn.Linear(2, 2))
    model = clip()
    model.visual = nn.Linear(2, 2)
    with pytest.raises(AdaptError, match=r"the vision tower \(Linear\) has no attention"):
        sites_for(model)
