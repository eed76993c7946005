"""Tiny image-text models of every kind, for the tests of vlm: random weights, 32 pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SIZE, CONTEXT, VOCABULARY, WIDTH = 32, 8, 20, 8


def images(count: int = 3, size: int = SIZE) -> Tensor:
    """Normal noise."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def tokens(count: int = 3, context: int = CONTEXT) -> Tensor:
    """Texts of different lengths: words, the end (the largest number), padding."""
    found = torch.zeros(count, context, dtype=torch.long)
    for row in range(count):
        words = 2 + row % (context - 3)
        found[row, :words] = 1 + (torch.arange(words) * (row + 3)) % (VOCABULARY - 2)
        found[row, words] = VOCABULARY - 1
    return found


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The model in eval mode, with no weight left at a value that hides an error (0, 1)."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = make().eval()
        for name, parameter in model.named_parameters():
            if "logit" not in name:
                wide = parameter.ndim > 1 and parameter[0].numel() ** -0.5
                parameter.normal_(std=wide) if wide else parameter.add_(
                    torch.randn_like(parameter) / 4
                )
    return model


def clip(seed: int = 0, *, vocabulary: int = VOCABULARY, **eyes: Any) -> nn.Module:
    """open_clip's CLIP: nn.MultiheadAttention in both towers, causal text."""
    from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg

    eye = CLIPVisionCfg(
        **{"layers": 2, "width": 16, "head_width": 8, "patch_size": 16, "image_size": SIZE, **eyes}
    )
    reader = CLIPTextCfg(context_length=CONTEXT, vocab_size=vocabulary, width=12, heads=2, layers=2)
    return seeded(lambda: CLIP(WIDTH, eye, reader), seed)


def normed_clip() -> nn.Module:
    """CLIP with open_clip's own attention class, and all of its options that run."""
    options = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True}
    return clip(**options)


def custom_text_clip(**reads: Any) -> nn.Module:
    """CustomTextCLIP with open_clip's own towers; bidirectional text with a mask of the padding."""
    from open_clip import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    eye = CLIPVisionCfg(layers=2, width=16, head_width=8, patch_size=16, image_size=SIZE)
    size = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 12, "heads": 2}
    reader = CLIPTextCfg(**size, layers=2, **reads)
    return seeded(lambda: CustomTextCLIP(WIDTH, eye, reader))


def timm_and_bert() -> nn.Module:
    """CustomTextCLIP with a timm ViT of 160 pixels and a Hugging Face BERT."""
    from open_clip import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
    from open_clip.hf_model import HFTextEncoder
    from transformers import BertConfig

    def make() -> nn.Module:
        eye = CLIPVisionCfg(timm_model_name="test_vit", timm_pool="", image_size=160)
        reader = CLIPTextCfg(context_length=4, vocab_size=4, width=4, heads=1, layers=1)
        model: nn.Module = CustomTextCLIP(WIDTH, eye, reader)
        size: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}
        wide: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 16}
        config = BertConfig(
            vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **size, **wide, pad_token_id=0
        )
        model.text = HFTextEncoder("", WIDTH, config, "mean_pooler", "linear")
        return model

    return seeded(make)


def coca() -> nn.Module:
    """CoCa: text with a class token at its end, images pooled by attention."""
    from open_clip import CLIPTextCfg, CLIPVisionCfg, CoCa
    from open_clip.coca_model import MultimodalCfg

    pool: dict[str, Any] = {"attentional_pool": True, "attn_pooler_queries": 3}
    eye = CLIPVisionCfg(
        layers=2, width=16, head_width=8, patch_size=16, image_size=SIZE, output_tokens=True, **pool
    )
    size: dict[str, Any] = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "layers": 2}
    reader = CLIPTextCfg(**size, width=12, heads=2, embed_cls=True, output_tokens=True)
    writer = MultimodalCfg(**size, width=WIDTH, heads=2)
    return seeded(lambda: CoCa(WIDTH, writer, reader, eye))


def _halves() -> tuple[dict[str, Any], dict[str, Any]]:
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    eye = {**size, "hidden_size": 16, "image_size": SIZE, "patch_size": 16}
    reader = {**size, "hidden_size": 12, "vocab_size": VOCABULARY}
    return eye, {**reader, "max_position_embeddings": CONTEXT}


def transformers_clip() -> nn.Module:
    """CLIP as transformers has it."""
    from transformers import CLIPConfig, CLIPModel

    eye, reader = _halves()
    reader |= {"bos_token_id": 1, "eos_token_id": VOCABULARY - 1, "pad_token_id": 0}
    config: Any = CLIPConfig(vision_config=eye, text_config=reader, projection_dim=WIDTH)
    return seeded(lambda: CLIPModel(config))


def transformers_siglip() -> nn.Module:
    """SigLIP as transformers has it: pooled by attention, with a bias."""
    from transformers import SiglipConfig, SiglipModel

    eye, reader = _halves()
    reader |= {"projection_size": 16, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 1}
    config: Any = SiglipConfig(vision_config=eye, text_config=reader)
    return seeded(lambda: SiglipModel(config))


def wordwise() -> Any:
    """A tokenizer of transformers with one token per word and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[END]", "a", "photo", "of", "cat", "dog"]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "[PAD]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    end = [("[END]", 1)]
    made.post_processor = processors.TemplateProcessing("$A [END]", None, end)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", padding_side="right")


KINDS: dict[str, Callable[[], nn.Module]] = {
    "CLIP": clip,
    "CLIP, open_clip's attention": normed_clip,
    "CustomTextCLIP": custom_text_clip,
    "CoCa": coca,
    "CustomTextCLIP of timm and BERT": timm_and_bert,
    "transformers CLIP": transformers_clip,
    "transformers SigLIP": transformers_siglip,
}


def size_of(kind: str) -> int:
    """Pixels a side."""
    return 160 if "timm" in kind else SIZE
