"""Eleven ways to checkpoint the blocks of a small vision transformer, for test_replay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import timm
import torch
from timm.layers import set_reentrant_ckpt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from polyadapt.core import recompute

Way = Callable[[VisionTransformer, Tensor], Tensor]


class Tower(nn.Module):
    """A vision transformer whose blocks are checkpointed in one of many ways."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vit = VisionTransformer(
            img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
        )
        self.way = way

    def forward(self, image: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(image))
        logits: Tensor = self.vit.head(self.way(self.vit, x)[:, 0])
        return logits


def _plain(vit: VisionTransformer, x: Tensor) -> Tensor:
    y: Tensor = vit.blocks(x)
    return y


def _switch_of_timm(reentrant: bool, vit: VisionTransformer, x: Tensor) -> Tensor:
    vit.set_grad_checkpointing(True)
    set_reentrant_ckpt(reentrant)
    try:
        y: Tensor = timm.models.checkpoint_seq(vit.blocks, x)
        return y
    finally:
        set_reentrant_ckpt(False)


def _each_block(reentrant: bool, vit: VisionTransformer, x: Tensor) -> Tensor:
    for block in vit.blocks:
        x = checkpoint(block, x, use_reentrant=reentrant)
    return x


def _sequential(vit: VisionTransformer, x: Tensor) -> Tensor:
    y: Tensor = checkpoint_sequential(vit.blocks, 2, x, use_reentrant=False)
    return y


def _selective(vit: VisionTransformer, x: Tensor) -> Tensor:
    kept = [torch.ops.aten.addmm.default]
    for block in vit.blocks:
        contexts = partial(create_selective_checkpoint_contexts, kept)
        x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return x


def _cheap(vit: VisionTransformer, x: Tensor) -> Tensor:
    with recompute(vit):
        y: Tensor = vit.blocks(x)
    return y


def _nested(vit: VisionTransformer, x: Tensor) -> Tensor:
    inner = partial(_each_block, False, vit)
    y: Tensor = checkpoint(inner, x, use_reentrant=False)
    return y


def _apart(vit: VisionTransformer, x: Tensor) -> Tensor:
    for block in vit.blocks:
        x = x + checkpoint(lambda z, b: b.attn(b.norm1(z)), x, block, use_reentrant=False)
        x = x + checkpoint(lambda z, b: b.mlp(b.norm2(z)), x, block, use_reentrant=False)
    return x


def _trailing(vit: VisionTransformer, x: Tensor) -> Tensor:
    for block in vit.blocks:
        x = checkpoint(lambda z, b: torch.tanh(b(z)) * 1.5, x, block, use_reentrant=False)
    return x


def _trailing_plain(vit: VisionTransformer, x: Tensor) -> Tensor:
    for block in vit.blocks:
        x = torch.tanh(block(x)) * 1.5
    return x


WAYS: dict[str, Way] = {
    "none": _plain,
    "timm": partial(_switch_of_timm, False),
    "timm, reentrant": partial(_switch_of_timm, True),
    "block": partial(_each_block, False),
    "block, reentrant": partial(_each_block, True),
    "sequential": _sequential,
    "selective": _selective,
    "recompute": _cheap,
    "nested": _nested,
    "apart": _apart,
    "trailing": _trailing,
}
# Ways that compute something else than the blocks alone -> the same without checkpoints.
UNCHECKPOINTED: dict[str, Way] = {"trailing": _trailing_plain}
