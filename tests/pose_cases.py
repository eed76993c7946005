"""Cameras on a course, an estimate that drifts from them, and ways to move all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyadapt.geometry3d.cameras import pose
from polyadapt.geometry3d.rotations import rotation_of


def course(views: int = 40) -> Tensor:
    """Twice around, rising, looking about: [views, 4, 4] fp64, by formula."""
    t = torch.arange(views, dtype=torch.float64) * (4 * math.pi / views)
    centres = torch.stack([3 * t.cos(), 0.4 * t, 2 * t.sin()], -1)
    turns = torch.stack([0.2 * t.sin(), t, 0.1 * (2 * t).cos()], -1)
    return pose(rotation_of(turns), centres)


def drifted(views: int = 40) -> Tensor:
    """The course, off by centimetres and degrees, then in another frame of another scale."""
    t = torch.arange(views, dtype=torch.float64)
    off = 0.05 * torch.stack([(0.9 * t).sin(), (1.7 * t).cos(), (0.3 * t).sin()], -1)
    turns = 0.03 * torch.stack([(0.5 * t).cos(), (1.1 * t).sin(), (2.3 * t).sin()], -1)
    off_course = course(views) @ pose(rotation_of(turns), off)
    return transformed(off_course, scale=0.37)


def transformed(poses: Tensor, scale: float) -> Tensor:
    """All cameras through one similarity."""
    turn = rotation_of(torch.tensor([0.3, -1.1, 0.7], dtype=poses.dtype))
    shift = torch.tensor([5.0, -2.0, 1.0], dtype=poses.dtype)
    return pose(turn @ poses[:, :3, :3], scale * poses[:, :3, 3] @ turn.T + shift)


def turned(poses: Tensor, degrees: float) -> Tensor:
    """Every other camera about its own vertical axis; centres stay."""
    angles = torch.zeros(len(poses), 3, dtype=poses.dtype)
    angles[1::2, 1] = math.radians(degrees)
    return pose(poses[:, :3, :3] @ rotation_of(angles), poses[:, :3, 3])
