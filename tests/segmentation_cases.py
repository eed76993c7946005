"""A small SAM, its task and its configuration, for the tests of medical segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyadapt.core import LoRA, Recipe
from polyadapt.tests.command_cases import changed
from polyadapt.tests.medical_cases import SPARSE, save_vessels
from polyadapt.vision.medical.backbones import TransformersSAM
from polyadapt.vision.medical.data import Batch, GeneratedVessels
from polyadapt.vision.medical.task import Segmentation

SIDE = 32
OPTIONS: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": SIDE,
    "window_size": 3,
    "output_channels": 16,
    "global_attn_indexes": [1],
    "initializer_range": 0.3,
}
DECODER_OPTIONS: dict[str, Any] = {"mlp_dim": 8}
SPEC = TransformersSAM(pretrained=False, options=OPTIONS, decoder=DECODER_OPTIONS)
BACKBONE = {
    "class_path": "TransformersSAM",
    "init_args": {"pretrained": False, "options": OPTIONS, "decoder": DECODER_OPTIONS},
}


def task_of(recipe: Recipe | None = None, **settings: Any) -> Segmentation:
    """The small SAM with a method on its attention; the same numbers every time."""
    torch.manual_seed(0)
    return Segmentation(SPEC, recipe or LoRA(rank=2), **settings)


def vessels(count: int = 4, **common: Any) -> GeneratedVessels:
    """Few thick vessels, wider than high."""
    data = GeneratedVessels(
        train=count, val=2, test=2, height=SIDE - 8, width=SIDE, vessels=SPARSE, **common
    )
    data.setup()
    return data


def batch_for(task: Segmentation, count: int = 2) -> Batch:
    """The first training pictures as the task wants them."""
    data = vessels(count, batch_size=count)
    data.view, data.fractions = task.view, task.fractions
    found: Batch = next(iter(data.train_dataloader()))
    return found


def shift(task: Segmentation) -> None:
    """Move every trained number away from its start, where most methods do nothing."""
    with torch.no_grad():
        for parameter in [*task.adapters.parameters(), *task.head.parameters()]:
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)


def losses_of(task: Segmentation, steps: int, lr: float = 0.02) -> list[float]:
    """The losses of a few steps on the same pictures."""
    batch = batch_for(task)
    trained = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    found = []
    for _ in range(steps):
        loss: Tensor = task.training_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def configuration(**changes: Any) -> dict[str, Any]:
    """LoRA on the small SAM and on pictures in `pictures`; `changes` by their dotted keys."""
    made: dict[str, Any] = {
        "model": {
            "backbone": dict(BACKBONE),
            "adapter": {"class_path": "LoRA", "init_args": {"rank": 2}},
        },
        "data": {
            "class_path": "SegmentationFolders",
            "init_args": {
                "root": "pictures",
                "mask_suffix": "_mask",
                "val_patients": ["c"],
                "test_patients": ["d"],
            },
        },
        "trainer": {"max_epochs": 2, "enable_progress_bar": False, "accelerator": "cpu"},
    }
    return changed(made, **changes)


def save_pictures(folder: str = "pictures") -> None:
    """Four pictures with masks: a and b to train, c to validate, d to test."""
    save_vessels(Path(folder), ["a", "b", "c", "d"])
