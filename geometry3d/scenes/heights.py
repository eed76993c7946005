"""A height over a plane, z = z(x, y), and where rays meet it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .viewing import Rays

_STEPS, _HALVINGS = 16, 16


@dataclass(frozen=True, eq=False)
class Heights:
    """Heights over the square from -extent to extent, bilinear between `grid` [s, s]'s numbers.

    The plane's frame is `axes` [3, 3] (its columns in the world), around the world's origin; rays
    come from below its heights along its third axis.
    """

    grid: Tensor
    extent: float
    axes: Tensor

    def at(self, place: Tensor) -> Tensor:
        """Heights [n] at (x, y) [n, 2] of the plane; beyond its edge as at the edge."""
        where = (place / self.extent)[None, None]
        return F.grid_sample(
            self.grid[None, None], where, mode="bilinear", padding_mode="border", align_corners=True
        ).view(-1)


def meet(rays: Rays, heights: Heights) -> tuple[Tensor, Tensor, Tensor]:
    """Where each ray first meets the heights: its depth, x and y in the plane's frame, all [v, r].

    The first of 16 steps between the lowest and the highest height that ends above the surface,
    then 16 halvings: an error below 1e-6 of the range. A ray along the plane meets nothing: its
    depth is infinite.
    """
    views, many, _ = rays.directions.shape
    origins = (rays.origins @ heights.axes).repeat_interleave(many, 0)
    directions = rays.directions.view(-1, 3) @ heights.axes
    (o, oz), (d, dz) = ((x[:, :2].contiguous(), x[:, 2]) for x in (origins, directions))

    def below(depth: Tensor) -> Tensor:
        return oz + depth * dz < heights.at(torch.addcmul(o, depth[:, None], d))

    low, high = heights.grid.min() - 1e-3, heights.grid.max() + 1e-3
    depth = _first_not(below, (low - oz) / dz, (high - low) / dz / _STEPS)
    met = torch.where((dz > 0.05) & (depth > 0), depth, torch.inf)
    x, y = torch.addcmul(o, depth[:, None], d).T
    return met.view(views, many), x.reshape(views, many), y.reshape(views, many)


def _first_not(below: Callable[[Tensor], Tensor], begin: Tensor, step: Tensor) -> Tensor:
    under = torch.ones_like(begin, dtype=torch.bool)
    for _ in range(_STEPS):
        under &= below(begin + step)
        begin = torch.where(under, begin + step, begin)
    for _ in range(_HALVINGS):
        step = step / 2
        begin = torch.where(below(begin + step), begin + step, begin)
    return begin
