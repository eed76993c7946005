"""How a site is reached and why, in small models and in the real classes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import LoRA, Site, attach, select
from polyadapt.tests.site_models import Model, names, refusal

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
