"""Ways of cameras through a generated room: poses [views, 4, 4] in metres.

All stay in a ring around the middle, `RING` from it, that the room keeps free of things.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .draw import Draw
from .viewing import looking

RING = (1.8, 2.4)


def orbit(draw: Draw, views: int) -> Tensor:
    """An arc of 90 to 150 degrees around the middle, looking at it."""
    return _around(draw, views, draw.number(90, 150))


def apart(draw: Draw, views: int) -> Tensor:
    """All around the middle, looking past it: neighbours have little in common."""
    return _around(draw, views, 360 * (views - 1) / views, 0.6)


def walk(draw: Draw, views: int) -> Tensor:
    """A few steps on an arc of 30 degrees: neighbours have most in common, baselines are short."""
    return _around(draw, views, 30)


def _around(draw: Draw, views: int, arc: float, aside: float = 0.3) -> Tensor:
    angle = math.radians(arc) * torch.linspace(-0.5, 0.5, views) + draw.number(0, 2 * math.pi)
    radius, height = draw.uniform(*RING, views), draw.uniform(-0.5, 0.3, views)
    origins = torch.stack([radius * angle.cos(), height, radius * angle.sin()], -1)
    targets = draw.uniform(-aside, aside, views, 3) + torch.tensor([0.0, 0.5, 0.0])
    return looking(origins, targets, draw, roll=5)
