"""Cameras of generated scenes: where they stand, where they look, the rays of their pixels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cameras import pose, rays
from .draw import Draw


class Rays(NamedTuple):
    """The rays of v cameras: origin + t direction, where t is the depth z in the camera's frame."""

    origins: Tensor  # [v, 3] in the world
    directions: Tensor  # [v, h * w, 3] in the world, of length 1 along the camera's axis


def rays_of(poses: Tensor, focal: float, size: tuple[int, int]) -> Rays:
    """The rays through the centres of all pixels of images of `size` (height, width)."""
    local = rays(torch.tensor(focal), *size).view(-1, 3)
    return Rays(poses[:, :3, 3], local @ poses[:, :3, :3].mT)


def looking(origins: Tensor, targets: Tensor, draw: Draw, roll: float = 0.0) -> Tensor:
    """Poses [v, 4, 4] of cameras at `origins` [v, 3] that look at `targets` [v, 3].

    The world's y points down; each camera is turned about its axis by at most `roll` degrees.
    """
    ahead = F.normalize(targets - origins, dim=-1)
    down = torch.tensor([0.0, 1.0, 0.0]).expand_as(ahead)
    right = F.normalize(torch.linalg.cross(down, ahead), dim=-1)
    below = torch.linalg.cross(ahead, right)
    angle = draw.uniform(-math.radians(roll), math.radians(roll), len(origins), 1)
    cos, sin = angle.cos(), angle.sin()
    axes = torch.stack([cos * right + sin * below, cos * below - sin * right, ahead], -1)
    return pose(axes, origins)
