"""VTAB-1k: its 19 tasks, their lists, and how the field makes one number of 19.

Every task is trained on 1,000 labelled images. Settings are chosen on 800 of them by the accuracy
on the other 200; the result is top-1 on the whole test set after training on all 1,000.
Facts: the benchmark's paper (arXiv 1910.04867) was not read; they come from public code for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..core.errors import AdaptError
from ..core.images.lists import read_list, read_lists

GROUPS: Final = ("Natural", "Specialized", "Structured")
IMAGES: Final = 1000

MOST, REST, WHOLE, TEST = "train800.txt", "val200.txt", "train800val200.txt", "test.txt"
Lists = dict[str, str | None]
TUNE: Final[Lists] = {"train": MOST, "val": REST, "test": None}
FINAL: Final[Lists] = {"train": WHOLE, "val": None, "test": TEST}


@dataclass(frozen=True)
class Task:
    """One of the 19; `name` is its folder."""

    name: str
    group: str
    classes: int
    label: str


TASKS: Final = (
    Task("cifar", "Natural", 100, "object"),
    Task("caltech101", "Natural", 102, "object"),
    Task("dtd", "Natural", 47, "texture"),
    Task("oxford_flowers102", "Natural", 102, "species"),
    Task("oxford_iiit_pet", "Natural", 37, "breed"),
    Task("svhn", "Natural", 10, "digit"),
    Task("sun397", "Natural", 397, "scene"),
    Task("patch_camelyon", "Specialized", 2, "tumour"),
    Task("eurosat", "Specialized", 10, "land use"),
    Task("resisc45", "Specialized", 45, "aerial scene"),
    Task("diabetic_retinopathy", "Specialized", 5, "grade"),
    Task("clevr_count", "Structured", 8, "objects - 3"),
    Task("clevr_dist", "Structured", 6, "nearest object, in bins"),
    Task("dmlab", "Structured", 6, "reward and distance"),
    Task("kitti", "Structured", 4, "nearest vehicle, in bins"),
    Task("dsprites_loc", "Structured", 16, "x position, grouped"),
    Task("dsprites_ori", "Structured", 16, "orientation, grouped"),
    Task("smallnorb_azi", "Structured", 18, "azimuth"),
    Task("smallnorb_ele", "Structured", 9, "elevation"),
)


@dataclass(frozen=True)
class Summary:
    """Means of one value per task: of each group, of the groups (A), of the tasks (B)."""

    groups: dict[str, float]
    a: float
    b: float


def means(scores: Mapping[str, float]) -> Summary:
    """Task -> score; A is the mean of the group means (nearly all tables), B the flat mean.

    A table over 19 tasks differs by 2 to 5 points between the two. Tasks and groups that are
    missing are left out: then neither is a mean over VTAB-1k.

    >>> found = means({"cifar": 90.0, "svhn": 70.0, "kitti": 50.0})
    >>> found.groups, found.a, found.b
    ({'Natural': 80.0, 'Structured': 50.0}, 65.0, 70.0)
    """
    parts = _by_group(scores)
    groups = {group: _mean(values) for group, values in parts.items()}
    return Summary(groups, _mean(list(groups.values())), _mean(list(scores.values())))


def deviations(spreads: Mapping[str, float]) -> Summary:
    """The standard deviations of `means`, from those of the tasks over seeds.

    Of n values: the root of the sum of their squares, divided by n; per group, then over the
    groups (Adapter+'s rule). The same over all tasks for B, which is our addition.

    >>> deviations({"cifar": 3.0, "svhn": 4.0}).groups
    {'Natural': 2.5}
    """
    parts = _by_group(spreads)
    groups = {group: _spread(values) for group, values in parts.items()}
    return Summary(groups, _spread(list(groups.values())), _spread(list(spreads.values())))


def _by_group(values: Mapping[str, float]) -> dict[str, list[float]]:
    if unknown := sorted(set(values) - {task.name for task in TASKS}):
        raise AdaptError(f"VTAB-1k has no task {unknown[0]!r}")
    if not values:
        raise AdaptError("there is no task to take a mean of")
    found = {
        g: [values[t.name] for t in TASKS if t.group == g and t.name in values] for g in GROUPS
    }
    return {group: part for group, part in found.items() if part}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _spread(values: list[float]) -> float:
    return math.sqrt(sum(value**2 for value in values)) / len(values)


def tasks_in(root: Path, lists: Lists) -> list[Task]:
    """The tasks whose folder holds these lists, in their usual order."""
    names = [name for name in lists.values() if name is not None]
    found = [t for t in TASKS if all((root / t.name / name).is_file() for name in names)]
    if not found:
        raise AdaptError(
            f"{root} holds no task of VTAB-1k: folders such as {TASKS[0].name} or {TASKS[-1].name}"
            f" with {' and '.join(names)} are wanted"
        )
    return found


def check_lists(root: Path, task: Task, lists: Lists) -> None:
    """The lists can be read and name images that are there, before any task is trained.

    Where all are there, the final training has as many images as the tuning's two.
    """
    read_lists(root / task.name, lists, task.classes)
    files = [root / task.name / name for name in (WHOLE, MOST, REST)]
    if not all(file.is_file() for file in files):
        return
    whole, most, rest = (len(read_list(file)) for file in files)
    if whole != most + rest:
        raise AdaptError(
            f"{files[0]} has {whole} lines, {MOST} and {REST} together {most + rest}: they should"
            " name the same images"
        )
