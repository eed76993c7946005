"""The unknowns of an alignment: cameras, depths, and a similarity for every pair."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .cameras import centred_pixels
from .similarity import Similarity

# The geometric mean that the pairs' scales are held at, as in DUSt3R; without such a rule
# everything could shrink to a point, where all agree. Lengths of an alignment are in this unit.
MEAN_SCALE = 0.5


@dataclass(eq=False)
class Geometry:
    """n cameras of [h, w] pixels and m pairs, changed in place; p = h w pixels lie in one row."""

    rotations: Tensor  # [n, 3, 3] camera to world
    centres: Tensor  # [n, 3]
    focals: Tensor  # [n] pixels
    depths: Tensor  # [n, p]
    similarities: Similarity  # [m], from a pair's frame to the world
    size: tuple[int, int]

    def __post_init__(self) -> None:
        self.pixels = centred_pixels(*self.size, like=self.depths).flatten(0, 1)

    def rays(self, focal: Tensor) -> Tensor:
        """What each pixel sees at depth 1 for that focal, [p, 3]."""
        return torch.cat([self.pixels / focal, torch.ones_like(self.pixels[:, :1])], 1)

    def world(self, view: int) -> Tensor:
        """The view's world points [p, 3]."""
        points = self.depths[view, :, None] * self.rays(self.focals[view])
        return points @ self.rotations[view].mT + self.centres[view]

    def fix_gauge(self, share: Tensor | None = None) -> None:
        """Scale the world so that the pairs' scales have the geometric mean `MEAN_SCALE`.

        `share` [m], which add up to 1, says how much each counts; None: all alike.
        """
        scales = self.similarities.scale.log()
        mean = scales.mean() if share is None else (share * scales).sum()
        factor = (math.log(MEAN_SCALE) - mean).exp()
        self.centres *= factor
        self.depths *= factor
        self.similarities.scale.mul_(factor)
        self.similarities.translation.mul_(factor)

    def begin_at(self, view: int) -> None:
        """Turn and move the world so that the view's pose is the unit."""
        back, centre = self.rotations[view].mT.clone(), self.centres[view].clone()
        pairs = self.similarities
        self.rotations = back @ self.rotations
        self.centres = (self.centres - centre) @ back.mT
        moved = (pairs.translation - centre) @ back.mT
        self.similarities = Similarity(pairs.scale, back @ pairs.rotation, moved)
