"""Boxes and points that a person gives, in pixels of the pictures, as prompts of a SAM."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...core.errors import AdaptError
from .files import File
from .folders import read_table
from .sam import Prompt
from .view import View

Numbers = tuple[float, ...]
_EVERY = ""  # the name under which stands what holds for every picture
_BOX, _POINT = ("x0", "y0", "x1", "y1"), ("x", "y", "label")


@dataclass(frozen=True)
class Places:
    """Boxes (x0, y0, x1, y1) and points (x, y, label) by the pictures' names.

    x counts pixels to the right and y down, from the top left corner; label 1 is on the structure
    and 0 is not. Each box has a mask of its own, and a picture's mask is all of them together; its
    points are one prompt, for each of its boxes.
    """

    boxes: Mapping[str, Sequence[Numbers]]
    points: Mapping[str, Sequence[Numbers]]

    @staticmethod
    def read(boxes: Sequence[str], points: Sequence[str]) -> Places | None:
        """From words `x0,y0,x1,y1` and `x,y,label`, or a .csv file with columns image, x0, ...

        The words hold for every picture, a table for those that it names. None without words.

        >>> Places.read(["10,20,30,40"], []).boxes
        {'': [(10.0, 20.0, 30.0, 40.0)]}
        """
        if not boxes and not points:
            return None
        return Places(_told("--boxes", boxes, _BOX), _told("--points", points, _POINT))

    def prompt(self, names: Sequence[str], size: tuple[int, int], view: View) -> Prompt:
        """For one picture of (height, width), by the first of its names that is known.

        Boxes [1, m, 4] and points [1, m, n, 2] in pixels of the view's square. Raises `AdaptError`
        for a picture without any and for places outside of it.
        """
        boxes, points = _of(self.boxes, names), _of(self.points, names)
        if not boxes and not points:
            raise AdaptError(f"{names[0]} has no box and no point: the tables do not name it")
        for place in (*boxes, *points):
            _require_inside(place, names[0], size)
        scaled = view.scaled(*size)
        scale = torch.tensor([scaled[1] / size[1], scaled[0] / size[0]])
        around = torch.tensor(boxes) * scale.repeat(2) if boxes else None
        return Prompt(
            boxes=None if around is None else around[None],
            points=_repeated(torch.tensor([p[:2] for p in points]) * scale, boxes)
            if points
            else None,
            labels=_repeated(torch.tensor([p[2] for p in points]).long(), boxes)
            if points
            else None,
        )


def _repeated(one: torch.Tensor, boxes: Sequence[Numbers]) -> torch.Tensor:
    """[n, ...] -> [1, m, n, ...] for each of m boxes."""
    return one.expand(1, max(len(boxes), 1), *one.shape)


def _of(told: Mapping[str, Sequence[Numbers]], names: Sequence[str]) -> Sequence[Numbers]:
    return next((told[name] for name in (*names, _EVERY) if name in told), ())


def _told(option: str, words: Sequence[str], form: Sequence[str]) -> dict[str, list[Numbers]]:
    if len(words) == 1 and words[0].lower().endswith(".csv"):
        rows = read_table(File.at(words[0]), "image", *form)
    else:
        rows = [(_EVERY, *word.split(",")) for word in words]
    found: dict[str, list[Numbers]] = {}
    for image, *texts in rows:
        file = File(Path(), image)
        name = image[: len(image) - len(file.suffix)]
        found.setdefault(name, []).append(_numbers(option, texts, form))
    return found


def _numbers(option: str, texts: Sequence[str], form: Sequence[str]) -> Numbers:
    try:
        numbers = tuple(float(text) for text in texts)
    except ValueError:
        numbers = ()
    if len(numbers) == 2 and form == _POINT:
        numbers = (*numbers, 1.0)
    if len(numbers) != len(form) or not all(map(math.isfinite, numbers)):
        wanted = ",".join(form)
        raise AdaptError(f"{option}: {','.join(texts)!r} is not {wanted}, nor a .csv file of them")
    if form == _POINT and numbers[2] not in (0, 1):
        raise AdaptError(f"{option}: the label of {','.join(texts)} is 1 (on it) or 0 (not on it)")
    return numbers


def _require_inside(place: Numbers, name: str, size: tuple[int, int]) -> None:
    height, width = size
    xs, ys = (place[0::2], place[1::2]) if len(place) == 4 else (place[:1], place[1:2])
    inside = all(0 <= x <= width for x in xs) and all(0 <= y <= height for y in ys)
    if not inside or (len(place) == 4 and not (xs[0] < xs[1] and ys[0] < ys[1])):
        shown = ",".join(f"{number:g}" for number in place)
        raise AdaptError(
            f"{name} is {width} x {height} pixels (width x height): {shown} is no place in it"
        )
