"""A fit is stopped at its first batch when the adapters at a method's own sites do nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from polyadapt.core import VPT, AdaptedModule, AdaptError, BitFit, Recipe
from polyadapt.tests.training_cases import quiet_trainer


class Task(AdaptedModule):
    """A head on a small vision transformer."""

    def __init__(self, backbone: nn.Module, adapter: Recipe) -> None:
        super().__init__(backbone, adapter)
        self.head = nn.Linear(16, 3)

    def training_loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.head(self.backbone(images)), labels)


def vit(**settings: Any) -> VisionTransformer:
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0, **settings
    )


def fit(task: Task) -> None:
    data = TensorDataset(torch.randn(8, 3, 16, 16), torch.randint(3, (8,)))
    quiet_trainer().fit(task, DataLoader(data, batch_size=4))


def test_prompts_that_nothing_calls_are_named_at_the_first_batch() -> None:
    task = Task(vit(), VPT(prompts=2, deep=False))
    task.backbone.set_grad_checkpointing(True)  # type: ignore[operator]  # after attaching
    with pytest.raises(AdaptError, match=r"1 of 1 adapters .* do not act: blocks"):
        fit(task)


def test_of_a_methods_own_sites_some_may_be_idle() -> None:
    backbone = vit()
    backbone.add_module("unused", nn.Linear(4, 4))
    task = Task(backbone, BitFit())
    before = {name: t.clone() for name, t in task.adapters.state_dict().items()}
    fit(task)
    moved = [name for name, t in task.adapters.state_dict().items() if not t.equal(before[name])]
    assert "unused.bias/value" in before
    assert "unused.bias/value" not in moved
    assert "blocks.0.mlp.fc1.bias/value" in moved
