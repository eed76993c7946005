"""Small Segment Anything models of transformers' classes, every table filled with noise."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import SamConfig, SamModel

from polyadapt.vision.medical.sam import SegmentAnything

Module = TypeVar("Module", bound=nn.Module)

SIZE, PATCH, WINDOW, WIDTH, DIM = 64, 8, 3, 8, 16
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
    "output_channels": DIM,
    "window_size": WINDOW,
    "global_attn_indexes": [1],
    "num_pos_feats": DIM // 2,
    "initializer_range": 0.02,
}
DECODER: dict[str, Any] = {"mlp_dim": 8, "hidden_size": DIM, "num_attention_heads": 2}


def sam_model() -> SamModel:
    """transformers' own model, the reference."""
    prompts = {"hidden_size": DIM, "image_size": SIZE, "patch_size": PATCH}
    config = SamConfig(
        vision_config=VISION, prompt_encoder_config=prompts, mask_decoder_config=DECODER
    )
    model: SamModel = SamModel(config).eval()
    return noisy(model)


def noisy(model: Module, by: float = 0.2) -> Module:
    """The same with noise in all its parameters: fresh ones hold zeros where errors hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return model


def sam(model: SamModel | None = None) -> SegmentAnything:
    """Our interface to it."""
    model = sam_model() if model is None else model
    return SegmentAnything(model.vision_encoder, model.prompt_encoder, model.mask_decoder).eval()


def images(count: int = 2, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size)
