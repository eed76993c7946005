"""Segment Anything checkpoints under the names of their authors: the same under transformers'."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# Regular expression of a whole name, and what it becomes; the first that fits counts.
_BLOCK = r"image_encoder\.blocks\.(\d+)\."
_DOWN = r"prompt_encoder\.mask_downscaling\."
_UP = r"mask_decoder\.output_upscaling\."
_DECODER = r"mask_decoder\.transformer\."
_MLPS = r"mask_decoder\.(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\."
_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"
_RULES = (
    (r"image_encoder\.patch_embed\.proj\.(.*)", r"vision_encoder.patch_embed.projection.\1"),
    (_BLOCK + r"norm([12])\.(.*)", r"vision_encoder.layers.\1.layer_norm\2.\3"),
    (_BLOCK + r"(.*)", r"vision_encoder.layers.\1.\2"),
    (r"image_encoder\.neck\.0\.(.*)", r"vision_encoder.neck.conv1.\1"),
    (r"image_encoder\.neck\.1\.(.*)", r"vision_encoder.neck.layer_norm1.\1"),
    (r"image_encoder\.neck\.2\.(.*)", r"vision_encoder.neck.conv2.\1"),
    (r"image_encoder\.neck\.3\.(.*)", r"vision_encoder.neck.layer_norm2.\1"),
    (r"image_encoder\.(.*)", r"vision_encoder.\1"),
    (r"prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix", _POSITIONS),
    (r"prompt_encoder\.point_embeddings\.(.*)", r"prompt_encoder.point_embed.\1"),
    (_DOWN + r"0\.(.*)", r"prompt_encoder.mask_embed.conv1.\1"),
    (_DOWN + r"1\.(.*)", r"prompt_encoder.mask_embed.layer_norm1.\1"),
    (_DOWN + r"3\.(.*)", r"prompt_encoder.mask_embed.conv2.\1"),
    (_DOWN + r"4\.(.*)", r"prompt_encoder.mask_embed.layer_norm2.\1"),
    (_DOWN + r"6\.(.*)", r"prompt_encoder.mask_embed.conv3.\1"),
    (
        _DECODER + r"layers\.(\d+)\.norm([1-4])\.(.*)",
        r"mask_decoder.transformer.layers.\1.layer_norm\2.\3",
    ),
    (_DECODER + r"norm_final_attn\.(.*)", r"mask_decoder.transformer.layer_norm_final_attn.\1"),
    (_UP + r"0\.(.*)", r"mask_decoder.upscale_conv1.\1"),
    (_UP + r"1\.(.*)", r"mask_decoder.upscale_layer_norm.\1"),
    (_UP + r"3\.(.*)", r"mask_decoder.upscale_conv2.\1"),
    (_MLPS + r"0\.(.*)", r"mask_decoder.\1.proj_in.\2"),
    (_MLPS + r"1\.(.*)", r"mask_decoder.\1.layers.0.\2"),
    (_MLPS + r"2\.(.*)", r"mask_decoder.\1.proj_out.\2"),
)


def transformers_name(name: str) -> str:
    """The name in `SegmentAnything` of a tensor of the authors' checkpoints.

    >>> transformers_name("image_encoder.blocks.3.attn.qkv.weight")
    'vision_encoder.layers.3.attn.qkv.weight'
    """
    for pattern, ours in _RULES:
        if found := re.fullmatch(pattern, name):
            return found.expand(ours)
    return name


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a checkpoint by `transformers_name`; none is lost or changed."""
    return {transformers_name(name): tensor for name, tensor in state.items()}
