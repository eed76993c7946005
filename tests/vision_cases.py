"""Small images, configurations and commands that the tests of the vision domain share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from polyadapt.tests.command_cases import CODE, Ran, changed

TINY_OPTIONS = {"patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 2}
TINY = {
    "name": "vit_tiny_patch16_224",
    "pretrained": False,
    "img_size": 16,
    "options": TINY_OPTIONS,
}


def noise(seed: int, width: int = 20, height: int = 12) -> Image.Image:
    """A picture of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image(path: str, seed: int = 0) -> str:
    """The path of a file with such a picture."""
    noise(seed).save(path)
    return path


def save_images(folder: Path, count: int) -> None:
    """0.png, 1.png, ... in a new folder."""
    folder.mkdir(parents=True)
    for index in range(count):
        noise(index).save(folder / f"{index}.png")


def configuration(**changes: Any) -> dict[str, Any]:
    """LoRA on a tiny random ViT; `changes` are values by their dotted keys."""
    made: dict[str, Any] = {
        "model": {
            "backbone": {"class_path": "TimmBackbone", "init_args": dict(TINY)},
            "adapter": {"class_path": "LoRA", "init_args": {"rank": 2}},
            "at": "blocks.*.attn.qkv",
        },
        "data": {"class_path": "ArrayData", "init_args": {"path": "arrays.npz", "batch_size": 6}},
        "trainer": {"max_epochs": 2, "enable_progress_bar": False, "accelerator": "cpu"},
    }
    return changed(made, **changes)


def save_labelled(count: int = 24, classes: int = 3) -> None:
    """arrays.npz here: pictures of random colours in classes that mean nothing."""
    labels = np.arange(count) % classes
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    np.savez(
        "arrays.npz",
        train_images=images,
        train_labels=labels,
        test_images=images[:6],
        test_labels=labels[:6],
        classes=np.array(["cat", "dog", "eel"]),
    )


def started(*words: str) -> subprocess.Popen[str]:
    """A command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", CODE, "vision", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(*words: str) -> Ran:
    """What such a process returned and printed."""
    process = started(*words)
    out, err = process.communicate()
    return Ran(process.returncode, out, err)
