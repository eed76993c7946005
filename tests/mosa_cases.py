"""What the tests of MoSA share: a tiny ViT, adapters of a block, and a few steps of training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, nn

from polyadapt.core import AdapterSet, MoSA, Site
from polyadapt.core.adapters.mosa import MoSAAdapter
from polyadapt.core.layers import BlockLayer

HERE = BlockLayer(nn.Identity(), None)


def vit() -> VisionTransformer:
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3
    ).eval()


def block(width: int) -> Site:
    return Site("blocks.0", None, None, None, "block", (width,), "output", "a whole module")


def built(recipe: MoSA, width: int = 16, seed: int = 0) -> MoSAAdapter:
    adapter = recipe.build(block(width), None, Generator().manual_seed(seed))
    assert isinstance(adapter, MoSAAdapter)
    return adapter


def wake(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.5)


def train(module: nn.Module, optimiser: torch.optim.Optimizer, steps: int) -> None:
    """A few steps of a loss that moves everything; the batch is the same at each."""
    image, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    module.train()
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(module(image), labels).backward()
        optimiser.step()
    module.eval()


def adam(made: AdapterSet, weight_decay: float = 0.0, lr: float = 0.01) -> torch.optim.AdamW:
    return torch.optim.AdamW(made.parameter_groups(lr=lr, weight_decay=weight_decay))
