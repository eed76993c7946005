"""CoOp's protocol for few-shot data: its split files, its own splits by seed, K shots, halves.

The data sets of "Learning to Prompt for Vision-Language Models" (arXiv 2109.01134) are published as
JSON files `split_zhou_<name>.json` that list the images of each part.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Generator

from ..core.errors import AdaptError, require_word
from ..core.images.preprocessing import open_image
from ..core.images.sources import Source, Sources

Row = tuple[str, int, str]
"""Path of an image, label, name of the class."""
Fewer = Literal["repeat", "refuse"]
Half = Literal["all", "base", "new"]

TRAIN_SHARE, VAL_SHARE = 0.5, 0.2
MOST_VALIDATION = 4


# Split files


def read_split(file: Path, images: Path) -> Sources:
    """The parts that a split file lists; its paths begin at the folder `images`.

    The file: {"train": [[path, label, class name], ...], "val": [...], "test": [...]}. Raises
    `AdaptError` for a file of another form, a label with two names, labels with gaps, a class that
    only the test part has and an image that is not there.
    """
    try:
        parts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdaptError(f"cannot read the split file {file}: {error}") from error
    rows = {part: _rows(file, part, parts) for part in ("train", "val", "test")}
    return listed(file, images, rows)


def _rows(file: Path, part: str, parts: Any) -> list[Row]:
    rows = parts.get(part) if isinstance(parts, Mapping) else None
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise AdaptError(f"{file}: {part!r} is no list of [path, label, class name]")
    return [(path, label, name) for path, label, name in rows]


def _is_row(row: object) -> bool:
    kinds = [str, int, str]
    return isinstance(row, list) and [type(value) for value in row] == kinds and row[1] >= 0


def listed(origin: Path, images: Path, rows: Mapping[str, Sequence[Row]]) -> Sources:
    """Sources of the listed images; `origin` is the list's name, for complaints."""
    classes = _classes(origin, [row for part in rows.values() for row in part])
    if missing := sorted(set(range(len(classes))) - {label for _, label, _ in rows["train"]}):
        raise AdaptError(f"{origin}: no training image of {classes[missing[0]]!r}")
    made = {part: _source(images, part_rows) for part, part_rows in rows.items() if part_rows}
    for path in sorted({path for part_rows in rows.values() for path, _, _ in part_rows}):
        if not (images / path).is_file():
            raise AdaptError(f"{origin} names {path!r}, but there is no file {images / path}")
    return Sources(classes, made["train"], made.get("val"), made.get("test"))


def _classes(origin: Path, rows: Sequence[Row]) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for _, label, name in rows:
        if names.setdefault(label, name) != name:
            raise AdaptError(f"{origin}: the label {label} is {names[label]!r} and {name!r}")
    if sorted(names) != list(range(len(names))) or not names:
        raise AdaptError(f"{origin}: the labels do not count from 0 to {len(names) - 1}")
    return tuple(names[label] for label in range(len(names)))


def _source(images: Path, rows: Sequence[Row]) -> Source:
    files = [images / path for path, _, _ in rows]
    return Source([label for _, label, _ in rows], partial(_opened, files))


def _opened(files: Sequence[Path], index: int) -> Image.Image:
    return open_image(files[index])


# Parts, shots and halves by seed


def split_by_seed(classes: tuple[str, ...], source: Source, seed: int) -> Sources:
    """CoOp's shares where no split is published: of every class 50 %, 20 %, 30 %.

    >>> made = split_by_seed(("a", "b"), Source([0, 1] * 10, Image.new), seed=0)
    >>> [len(part.labels) for part in (made.train, made.val, made.test) if part]
    [10, 4, 6]
    """
    train, val, test = [], [], []
    for indices in _by_class(source.labels, seed):
        first, second = (max(1, round(part * len(indices))) for part in (TRAIN_SHARE, VAL_SHARE))
        train += indices[:first]
        val += indices[first : first + second]
        test += indices[first + second :]
    return Sources(classes, *(picked(source, sorted(part)) for part in (train, val, test)))


def draw_shots(labels: Sequence[int], shots: int, seed: int, fewer: Fewer = "repeat") -> list[int]:
    """Indices of `shots` images of every class, drawn by `seed`.

    A class that has fewer gives all it has and some of them again, with a warning; `fewer` "refuse"
    makes that an `AdaptError`.

    >>> sorted(draw_shots([0, 1, 0, 1, 0], shots=2, seed=0))
    [0, 1, 3, 4]
    """
    if shots < 1 or fewer not in get_args(Fewer):
        raise AdaptError(f"shots={shots}, fewer={fewer!r}: from 1; {' or '.join(get_args(Fewer))}")
    drawn: list[int] = []
    for indices in _by_class(labels, seed):
        if len(indices) < shots:
            told = f"shots={shots}: class {labels[indices[0]]} has only {len(indices)} images"
            if fewer == "refuse":
                raise AdaptError(told)
            warnings.warn(f"{told}; they are used more than once", stacklevel=2)
        drawn.extend(indices[i % len(indices)] for i in range(shots))
    return drawn


def few_shot(sources: Sources, shots: int, seed: int, fewer: Fewer = "repeat") -> Sources:
    """K training images of every class, and min(K, 4) validation images of it; the test part stays.

    Both are drawn from their own parts, by the same seed.
    """
    val = sources.val
    if val is not None:
        most = min(shots, MOST_VALIDATION)
        kept = [i for indices in _by_class(val.labels, seed) for i in indices[:most]]
        val = picked(val, kept)
    train = picked(sources.train, draw_shots(sources.train.labels, shots, seed, fewer))
    return Sources(sources.classes, train, val, sources.test)


def half_of(sources: Sources, half: Half) -> Sources:
    """The base classes (the first ceil(n / 2) labels) or the new ones (the rest), from label 0.

    >>> half_of(Sources(("a", "b", "c"), Source([0, 1, 2, 2], Image.new)), "new").classes
    ('c',)
    """
    require_word("half", half, Half)
    if half == "all":
        return sources
    border = math.ceil(len(sources.classes) / 2)
    labels = range(border) if half == "base" else range(border, len(sources.classes))
    parts = [_of_classes(part, labels) for part in (sources.val, sources.test)]
    classes = tuple(sources.classes[label] for label in labels)
    return Sources(classes, _kept(sources.train, labels), *parts)


def _of_classes(source: Source | None, labels: range) -> Source | None:
    return None if source is None else _kept(source, labels)


def _kept(source: Source, labels: range) -> Source:
    indices = [i for i, label in enumerate(source.labels) if label in labels]
    moved = [source.labels[i] - labels.start for i in indices]
    return Source(moved, partial(_picked, source, indices))


def picked(source: Source, indices: Sequence[int]) -> Source:
    """The images of these indices, an index as often as it is there."""
    return Source([source.labels[i] for i in indices], partial(_picked, source, list(indices)))


def _picked(source: Source, indices: Sequence[int], index: int) -> Image.Image:
    return source.image(indices[index])


def _by_class(labels: Sequence[int], seed: int) -> list[list[int]]:
    """The indices of every label in the order of labels, shuffled by `seed`."""
    order = torch.randperm(len(labels), generator=Generator().manual_seed(seed)).tolist()
    found: dict[int, list[int]] = {label: [] for label in sorted(Counter(labels))}
    for index in order:
        found[labels[index]].append(index)
    return list(found.values())
