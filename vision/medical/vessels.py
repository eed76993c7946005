"""Generated vessel trees: pictures of any size by seed, whose masks are exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ...core.errors import AdaptError

Mask = NDArray[np.uint8]
Pixels = NDArray[np.float32]

_MURRAY = 3.0  # r^3 = r1^3 + r2^3 where a vessel divides, as flow at least work wants it
_MOST_PIECES = 5000  # a tree that never thins would not end
_BLOOD = np.array([0.35, 0.75, 0.55])  # how much of red, green and blue a vessel takes away
_FUNDUS = np.array([0.72, 0.42, 0.22])


@dataclass(frozen=True, kw_only=True)
class Vessels:
    """How trees grow and what a picture of them looks like; lengths are parts of the shorter side.

    trunks: vessels that leave the root; width: radius of the widest; least: radius below which a
    vessel ends; length: of a vessel between two divisions, in radii; wiggle: standard deviation of
    its turn at each step of two radii, in radians; contrast: of the vessels, 0 to 1; noise: of the
    picture, as the standard deviation at full brightness; colour: like a fundus photograph, else
    grey.
    """

    trunks: int = 5
    width: float = 0.014
    least: float = 0.003
    length: float = 9.0
    wiggle: float = 0.17
    contrast: float = 0.45
    noise: float = 0.03
    colour: bool = True

    def __post_init__(self) -> None:
        _require(self.trunks >= 1, "trunks", self.trunks, "from 1")
        _require(0 < self.least < self.width < 0.5, "width", self.width, "above least, below 0.5")
        _require(self.length > 0, "length", self.length, "above 0")
        _require(0 < self.contrast <= 1, "contrast", self.contrast, "above 0, at most 1")
        _require(self.wiggle >= 0, "wiggle", self.wiggle, "from 0")
        _require(self.noise >= 0, "noise", self.noise, "from 0")


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise AdaptError(f"vessels: {name}={value!r} is not allowed: {allowed}")


def grow(seed: int, how: Vessels | None = None) -> NDArray[np.float64]:
    """A tree as pieces [n, 5]: from (y, x) to (y, x), and the radius, in parts of the shorter side.

    Every vessel is a walk whose direction drifts; where it ends it divides into two with the radii
    of Murray's law (r^3 = r1^3 + r2^3), and the thinner one turns off further. Our own picture of
    a tree, no model of an organ.

    >>> tree = grow(seed=3)
    >>> tree.shape[1], bool(np.all(tree == grow(seed=3)))
    (5, True)
    """
    how = how or Vessels()
    draw = np.random.default_rng([seed, 1])
    root = draw.uniform(0.3, 0.7, size=2)
    towards = draw.uniform(0, 2 * math.pi)
    growing = [
        (root, towards + 2 * math.pi * trunk / how.trunks, how.width * draw.uniform(0.7, 1.0))
        for trunk in range(how.trunks)
    ]
    pieces: list[tuple[float, ...]] = []
    while growing and len(pieces) < _MOST_PIECES:
        start, heading, radius = growing.pop(0)
        end, heading = _walk(draw, start, heading, radius, how, pieces)
        if _inside(end):
            growing.extend(_divided(draw, end, heading, radius, how))
    return np.array(pieces)


def _walk(
    draw: Generator,
    at: NDArray[np.float64],
    heading: float,
    radius: float,
    how: Vessels,
    pieces: list[tuple[float, ...]],
) -> tuple[NDArray[np.float64], float]:
    """One vessel, appended to the pieces; returns where it ends and in which direction."""
    for _ in range(max(1, round(how.length / 2 * draw.uniform(0.7, 1.3)))):
        heading += how.wiggle * draw.standard_normal()
        # Thin vessels run further, for their width, than thick ones.
        step = np.array([math.sin(heading), math.cos(heading)]) * 2 * max(radius, 2 * how.least)
        pieces.append((*at, *(at + step), radius))
        at = at + step
        if not _inside(at):
            break
    return at, heading


def _divided(
    draw: Generator, at: NDArray[np.float64], heading: float, radius: float, how: Vessels
) -> list[tuple[NDArray[np.float64], float, float]]:
    share = draw.uniform(0.5, 0.85)  # of the flow, for the wider one
    side = 1 if draw.random() < 0.5 else -1
    ways = []
    for part, turn in ((share, -0.25 * side), (1 - share, 0.75 * side)):
        thinner = radius * part ** (1 / _MURRAY)
        if thinner >= how.least:
            ways.append((at, heading + turn * draw.uniform(0.7, 1.3), thinner))
    return ways


def _inside(point: NDArray[np.float64]) -> bool:
    return bool(np.all((point > -0.05) & (point < 1.05)))


def draw_mask(tree: NDArray[np.float64], height: int, width: int) -> Mask:
    """uint8 [height, width]: 1 where the middle of the pixel lies in a vessel, else 0.

    >>> draw_mask(np.array([[0.5, 0.0, 0.5, 1.0, 0.34]]), 5, 3)[:, 1].tolist()
    [0, 1, 1, 1, 0]
    """
    return (_depth(tree, height, width) >= 0).astype(np.uint8)


def _depth(tree: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """[height, width]: how deep in a vessel a pixel's middle lies, in pixels; -inf far from all."""
    if min(height, width) < 1:
        raise AdaptError(f"a picture of {height} x {width} is not allowed: from 1 x 1")
    depth = np.full((height, width), -np.inf)
    pixels = tree * min(height, width)
    pixels[:, [0, 2]] += (height - min(height, width)) / 2
    pixels[:, [1, 3]] += (width - min(height, width)) / 2
    for y0, x0, y1, x1, radius in pixels:
        margin = radius + 2
        top, bottom = _between(min(y0, y1) - margin, max(y0, y1) + margin, height)
        left, right = _between(min(x0, x1) - margin, max(x0, x1) + margin, width)
        y, x = np.mgrid[top:bottom, left:right] + 0.5
        along, across = y1 - y0, x1 - x0
        # How far along the piece the nearest point lies, from 0 (its start) to 1 (its end).
        near = ((y - y0) * along + (x - x0) * across) / max(along**2 + across**2, 1e-12)
        near = np.clip(near, 0, 1)
        distance = np.hypot(y - y0 - near * along, x - x0 - near * across)
        part = depth[top:bottom, left:right]
        np.maximum(part, radius - distance, out=part)
    return depth


def _between(low: float, high: float, most: int) -> tuple[int, int]:
    return min(max(math.floor(low), 0), most), min(max(math.ceil(high), 0), most)


def vessel_picture(
    seed: int, height: int, width: int, how: Vessels | None = None
) -> tuple[Pixels, Mask]:
    """A picture of a tree in [0, 1], float32 [height, width, 3] or [height, width], and its mask.

    The background has shading and slow blotches, vessels are darker with soft edges, and the noise
    grows with the root of the brightness, as counted light's does. The mask is that of the tree,
    whatever the size: one tree has one mask per size, up to the grid.

    >>> picture, mask = vessel_picture(seed=0, height=48, width=64)
    >>> picture.shape, mask.shape, mask.dtype, bool(0.02 < mask.mean() < 0.4)
    ((48, 64, 3), (48, 64), dtype('uint8'), True)
    """
    how = how or Vessels()
    depth = _depth(grow(seed, how), height, width)
    draw = np.random.default_rng([seed, 2])
    light = _background(draw, height, width)
    # Half as dark at the border, in full one pixel inside it: what a lens does to an edge.
    dark = how.contrast * np.clip(depth / 2 + 0.5, 0, 1)
    if how.colour:
        picture = light[..., None] * _FUNDUS * (1 - dark[..., None] * _BLOOD)
    else:
        picture = light * (1 - dark)
    noisy = picture + how.noise * np.sqrt(picture) * draw.standard_normal(picture.shape)
    return np.clip(noisy, 0, 1).astype(np.float32), (depth >= 0).astype(np.uint8)


def _background(draw: Generator, height: int, width: int) -> NDArray[np.float64]:
    """[height, width] in 0 to 1: brighter around one place, with waves of random direction."""
    y = (np.arange(height) + 0.5)[:, None] / min(height, width)
    x = (np.arange(width) + 0.5)[None, :] / min(height, width)
    middle = draw.uniform(0.35, 0.65, size=2)
    light: Any = 0.95 - 0.35 * ((y - middle[0]) ** 2 + (x - middle[1]) ** 2)
    for _ in range(6):
        pull, phase = draw.uniform(-4, 4, size=2), draw.uniform(0, 2 * math.pi)
        light = light + 0.025 * np.sin(2 * math.pi * (pull[0] * y + pull[1] * x) + phase)
    shaded: NDArray[np.float64] = np.clip(light, 0.05, 1)
    return shaded
