"""VTAB-mini: the benchmark's 19 folders with a few tiny images each, made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from polyadapt.vision.vtab_tasks import TASKS, Task

SIZES = {"train800": 8, "val200": 4, "test": 4}


def save_task(root: Path, task: Task) -> None:
    """Grey and coloured noise in uneven sizes; labels that run through the first classes."""
    folder = root / task.name
    lists: dict[str, list[str]] = {}
    for part, count in SIZES.items():
        (folder / "images" / part).mkdir(parents=True)
        lists[part] = []
        for index in range(count):
            path = f"images/{part}/{index}.png"
            _noise(index + count).save(folder / path)
            lists[part].append(f"{path} {index % min(task.classes, 4)}")
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for part, lines in lists.items():
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")


def save_vtab_mini(root: Path, tasks: Sequence[Task] = TASKS) -> Path:
    """All tasks, or some, in a new folder."""
    for task in tasks:
        save_task(root, task)
    return root


def _noise(seed: int) -> Image.Image:
    shape = (16, 20, 3) if seed % 2 else (20, 16)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))
