"""Pinhole cameras: pixels to rays, depth to points, points back to pixels.

Square pixels, the principal point at the centre, no distortion; the axes as `pointmaps` says.
"""

from __future__ import annotations

import torch
from torch import Tensor


def centred_pixels(height: int, width: int, like: Tensor | None = None) -> Tensor:
    """Every pixel's centre, counted from the principal point: (u - w/2, v - h/2), [h, w, 2].

    `like` gives type and device.

    >>> centred_pixels(2, 4)[0, :, 0].tolist()
    [-1.5, -0.5, 0.5, 1.5]
    """
    if like is None:
        like = torch.empty(0)
    across = torch.arange(width, dtype=like.dtype, device=like.device) + 0.5 - width / 2
    down = torch.arange(height, dtype=like.dtype, device=like.device) + 0.5 - height / 2
    return torch.stack(torch.meshgrid(across, down, indexing="xy"), -1)


def rays(focals: Tensor, height: int, width: int) -> Tensor:
    """What each pixel sees at depth 1: ((u - w/2) / f, (v - h/2) / f, 1), [..., h, w, 3]."""
    flat = centred_pixels(height, width, focals) / focals[..., None, None, None]
    return torch.cat([flat, torch.ones_like(flat[..., :1])], -1)


def camera_points(depths: Tensor, focals: Tensor) -> Tensor:
    """Depth maps [..., h, w] and focals [...] -> points in the camera's frame [..., h, w, 3].

    >>> camera_points(torch.full((1, 2, 2), 3.0), torch.tensor([0.5]))[0, 0, 0].tolist()
    [-3.0, -3.0, 3.0]
    """
    height, width = depths.shape[-2:]
    return depths[..., None] * rays(focals, height, width)


def world_points(depths: Tensor, focals: Tensor, poses: Tensor) -> Tensor:
    """Depth maps [..., h, w] of cameras at poses [..., 4, 4] -> world points [..., h, w, 3]."""
    return moved(camera_points(depths, focals), poses)


def moved(points: Tensor, poses: Tensor) -> Tensor:
    """Points [..., h, w, 3] through poses [..., 4, 4]: from the cameras' frames to the world."""
    turned = points @ poses[..., None, :3, :3].mT
    return turned + poses[..., None, None, :3, 3]


def inverse_poses(poses: Tensor) -> Tensor:
    """Camera-to-world to world-to-camera and back, [..., 4, 4]; exact for rotations."""
    back = poses[..., :3, :3].mT
    return pose(back, -(back @ poses[..., :3, 3:])[..., 0])


def pose(rotation: Tensor, centre: Tensor) -> Tensor:
    """Rotations [..., 3, 3] and centres [..., 3] as matrices [..., 4, 4]."""
    top = torch.cat([rotation, centre[..., None]], -1)
    last = torch.zeros_like(top[..., :1, :])
    last[..., 3] = 1
    return torch.cat([top, last], -2)


def pixels_of(points: Tensor, focals: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Points [..., p, 3] in a camera's frame -> positions (u, v) [..., p, 2] and depths [..., p].

    A point that is not in front of the camera has no position: its u and v are NaN.
    """
    depth = points[..., 2]
    front = torch.where(depth > 0, depth, torch.nan)
    middle = points.new_tensor([width / 2, height / 2])
    return focals[..., None, None] * points[..., :2] / front[..., None] + middle, depth
