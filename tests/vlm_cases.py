"""A tiny CLIP that a configuration can name, labelled images, and commands of the vlm domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from polyadapt.tests.command_cases import changed
from polyadapt.tests.vlm_models import clip
from polyadapt.vlm.backbones import Backbone
from polyadapt.vlm.model import ImageText, image_text_of
from polyadapt.vlm.split import split_attention

COLOURS = ("red", "green", "blue")
TEMPLATE = "a {}."  # the tiny CLIP reads 8 tokens


@dataclass(frozen=True, kw_only=True)
class TinyCLIP(Backbone):
    """open_clip's CLIP with random weights, CLIP's own tokenizer and a context of 8 tokens."""

    seed: int = 0

    def build(self) -> nn.Module:
        model = clip(self.seed, vocabulary=49408)
        split_attention(model)
        return model

    def image_text(self, model: nn.Module) -> ImageText:
        return image_text_of(model)


def save_colours(path: str = "arrays.npz", count: int = 24) -> None:
    """Images whose class is the channel that is bright."""
    labels = np.arange(count) % 3
    images = np.random.default_rng(0).integers(0, 80, (count, 16, 16, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] += 120
    np.savez(
        path,
        train_images=images,
        train_labels=labels,
        test_images=images[:6],
        test_labels=labels[:6],
        classes=np.array(COLOURS),
    )


def configuration(**changes: Any) -> dict[str, Any]:
    """LoRA on the tiny CLIP, 2 shots, 3 steps a shot; `changes` are values by their dotted keys."""
    made: dict[str, Any] = {
        "model": {
            "backbone": "TinyCLIP",
            "adapter": {"class_path": "LoRA", "init_args": {"rank": 2, "dropout": 0.25}},
            "template": TEMPLATE,
            "steps_per_shot": 3,
            "lr": 1e-3,
        },
        "data": {
            "class_path": "ArrayData",
            "init_args": {"path": "arrays.npz", "batch_size": 4, "shots": 2},
        },
        "trainer": {"enable_progress_bar": False, "accelerator": "cpu"},
    }
    return changed(made, **changes)
