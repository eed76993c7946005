"""Backbones of the real classes at tiny random size, for test_laws_real_classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 3


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def image(size: int = 16) -> Tensor:
    """A batch of images."""
    return _randn(BATCH, 3, size, size)


def mel() -> Tensor:
    """A batch of spectrograms of ten positions."""
    return _randn(BATCH, 8, 20)


def words() -> Tensor:
    """A batch of token numbers."""
    return torch.arange(4 * BATCH).view(BATCH, 4)


@dataclass(frozen=True)
class Real:
    """A class that others wrote, where to adapt it, and how it is called."""

    make: Callable[[], nn.Module]
    at: Sequence[str]  # layers with a weight
    blocks: str  # its transformer blocks
    call: Callable[[Any], Tensor]
    mixes: str = ""  # why one set per sample is refused, if it is

    def model(self) -> nn.Module:
        """The frozen model in eval mode, with nothing left at zero or one."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = self.make().eval().requires_grad_(False)
            for parameter in model.parameters():
                wide = parameter.ndim > 1 and parameter[0].numel() ** -0.5
                parameter.normal_(std=wide) if wide else parameter.add_(
                    torch.randn_like(parameter) / 4
                )
        return model


VIT: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}
SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": (1, 2),
    "num_heads": (2, 2),
    "window_size": 4,
    "num_classes": 5,
}


def _vision_transformer() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**VIT)


def _swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(**SWIN)


def _swin_v2() -> nn.Module:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return SwinTransformerV2(**SWIN)


def _beit() -> nn.Module:
    from timm.models.beit import Beit

    return Beit(**VIT, use_rel_pos_bias=True, init_values=0.5)


def _eva(fused: bool) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from timm.models.eva import Eva

        return Eva(**VIT, qkv_fused=fused, use_rot_pos_emb=True, swiglu_mlp=True, mlp_ratio=2)

    return make


TIMM = {
    "timm ViT": Real(
        _vision_transformer,
        ["blocks.*.attn.qkv[q,v]", "blocks.*.mlp.fc1", "patch_embed.proj"],
        "blocks.*",
        lambda m: m(image()),
    ),
    "timm Swin": Real(
        _swin,
        [
            "layers.*.blocks.*.attn.{qkv,relative_position_bias_table}",
            "layers.*.downsample.reduction",
        ],
        "layers.*.blocks.*",
        lambda m: m(image(32)),
        mixes="3 names were given for a batch of 12",  # its attention sees windows, not images
    ),
    "timm Swin V2": Real(
        _swin_v2,
        ["layers.*.blocks.*.attn.{qkv,proj,cpb_mlp.2}"],
        "layers.*.blocks.*",
        lambda m: m(image(32)),
        mixes="3 names were given for a batch of 12",
    ),
    "timm BEiT": Real(
        _beit,
        ["blocks.*.attn.qkv[q,v]", "blocks.*.{attn.relative_position_bias_table,mlp.fc2}"],
        "blocks.*",
        lambda m: m(image()),
    ),
    "timm EVA": Real(
        _eva(fused=True), ["blocks.*.attn.qkv[k]", "head"], "blocks.*", lambda m: m(image())
    ),
    "timm EVA, q k v apart": Real(
        _eva(fused=False),
        ["blocks.*.attn.{q_proj,k_proj}", "blocks.*.mlp.fc2"],
        "blocks.*",
        lambda m: m(image()),
    ),
}


def _open_clip_tower() -> nn.Module:
    from open_clip.model import VisionTransformer

    size = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "heads": 2}
    tower: nn.Module = VisionTransformer(**size, mlp_ratio=2.0, output_dim=8)
    return tower


def _open_clip() -> nn.Module:
    from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg

    eye = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=16)
    reader = CLIPTextCfg(context_length=4, vocab_size=20, width=32, heads=2, layers=2)
    clip: nn.Module = CLIP(8, eye, reader)
    return clip


def _openai_whisper() -> nn.Module:
    from whisper.model import ModelDimensions, Whisper

    model: Any = Whisper(ModelDimensions(8, 10, 16, 2, 2, 20, 12, 16, 2, 2))
    nn.init.normal_(model.decoder.positional_embedding)  # whisper leaves it as memory was
    whole: nn.Module = model
    return whole


def transformers_whisper() -> nn.Module:
    """Whisper as transformers has it."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    shape: dict[str, Any] = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
    heads: dict[str, Any] = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    wide: dict[str, Any] = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8}
    ends: dict[str, Any] = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    silent: dict[str, Any] = {"suppress_tokens": [], "begin_suppress_tokens": []}
    places: dict[str, Any] = {
        "vocab_size": 20,
        "max_source_positions": 10,
        "max_target_positions": 12,
    }
    config = WhisperConfig(**shape, **heads, **wide, **ends, **silent, **places)
    return WhisperForConditionalGeneration(config)


def _gpt2_config() -> Any:
    from transformers import GPT2Config

    size: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2Config(**size, vocab_size=20, bos_token_id=0, eos_token_id=0)


def gpt2_with_head() -> nn.Module:
    """GPT-2 with its tied head."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel(_gpt2_config())


def _gpt2() -> nn.Module:
    from transformers import GPT2Model

    return GPT2Model(_gpt2_config())


def _transformers_vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**shape, intermediate_size=48, image_size=16, patch_size=8)
    return ViTModel(config, add_pooling_layer=False)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


OTHERS = {
    "open_clip tower": Real(
        _open_clip_tower,
        ["transformer.resblocks.*.attn.in_proj_weight[q,k,v]", "transformer.**.c_fc", "conv1"],
        "transformer.resblocks.*",
        lambda m: m(image()),
    ),
    "open_clip CLIP": Real(
        _open_clip,
        ["visual.transformer.**.out_proj", "transformer.**.c_proj", "token_embedding"],
        "**.resblocks.*",
        lambda m: torch.cat(m(image(), words() + 1)[:2]),
    ),
    "openai Whisper": Real(
        _openai_whisper,
        [
            "encoder.{conv1,blocks.*.attn.query,blocks.*.mlp.2}",
            "decoder.{token_embedding,positional_embedding}",
            "decoder.blocks.*.{attn,cross_attn}.{key,value}",
        ],
        "{encoder,decoder}.blocks.*",
        lambda m: m(mel(), words()),
    ),
    "transformers Whisper": Real(
        transformers_whisper,
        [
            "model.encoder.{conv2,layers.*.self_attn.q_proj}",
            "model.decoder.{embed_positions,layers.*.encoder_attn.v_proj,layers.*.fc1}",
        ],
        "model.{encoder,decoder}.layers.*",
        lambda m: m(mel(), decoder_input_ids=words()).logits,
    ),
    "GPT-2": Real(
        _gpt2,
        ["h.*.attn.c_attn[q,v]", "h.*.mlp.c_proj", "wte"],
        "h.*",
        lambda m: m(words()).last_hidden_state,
    ),
    "GPT-2 with head": Real(
        gpt2_with_head,
        ["transformer.h.*.attn.c_attn[k]", "transformer.wpe"],
        "transformer.h.*",
        lambda m: m(words()).logits,
        mixes="3 names were given for a batch of 1",  # positions are looked up once for all samples
    ),
    "transformers ViT": Real(
        _transformers_vit,
        ["layers.*.attention.{q_proj,v_proj}", "layers.*.mlp.fc1"],
        "layers.*",
        lambda m: m(image()).last_hidden_state,
    ),
    "nn.TransformerEncoder": Real(
        _encoder,
        ["layers.*.{linear1,linear2,self_attn.out_proj}", "layers.*.self_attn.in_proj_weight[q,v]"],
        "layers.*",
        lambda m: m(_randn(BATCH, 5, 16)),
    ),
}
