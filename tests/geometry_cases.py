"""A small scene drawn by ray casting: a room's corner with spheres, seen from an arc of cameras."""

from __future__ import annotations

import torch
from torch import Tensor

from polyadapt.geometry3d.cameras import pose, rays
from polyadapt.geometry3d.graph import Complete
from polyadapt.geometry3d.reconstruction import Reconstruction

HEIGHT, WIDTH, FOCAL = 24, 32, 28.0

# Planes as (normal, offset): n . x = offset; spheres as (centre, radius).
PLANES = [((0.0, 1.0, 0.0), 1.2), ((0.0, 0.0, 1.0), 6.0), ((1.0, 0.0, 0.0), -2.5)]
SPHERES = [((0.3, 0.4, 4.0), 0.8), ((-1.2, 0.6, 4.6), 0.6), ((1.5, -0.4, 4.8), 0.7)]


def small_scene(
    views: int = 6, dtype: torch.dtype = torch.float32, arc: float = 1.0
) -> Reconstruction:
    """`views` cameras on an arc of `arc` units to both sides; the images hold the depth."""
    poses = torch.stack([_looking(x) for x in torch.linspace(-arc, arc, views).tolist()]).double()
    focals = torch.full((views,), FOCAL, dtype=torch.float64)
    directions = rays(focals, HEIGHT, WIDTH) @ poses[:, None, :3, :3].mT
    depths = _depths(directions, poses[:, :3, 3])
    images = (depths / depths.max())[:, None].expand(-1, 3, -1, -1)
    names = [f"view{number}" for number in range(views)]
    parts = (part.to(dtype) for part in (poses, focals, depths, torch.ones_like(depths), images))
    poses, focals, depths, weights, images = parts
    return Reconstruction(poses, focals, depths, weights, images, names)


def _looking(across: float) -> Tensor:
    """A pose at (across, 0, 0) that looks at (0, 0.2, 4.5)."""
    centre = torch.tensor([across, -0.15 * across * across, 0.1 * across], dtype=torch.float64)
    forward = torch.tensor([0.0, 0.2, 4.5], dtype=torch.float64) - centre
    forward = forward / forward.norm()
    right = torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), forward)
    right = right / right.norm()
    return pose(torch.stack([right, torch.linalg.cross(forward, right), forward], 1), centre)


def _depths(directions: Tensor, centres: Tensor) -> Tensor:
    """The nearest hit along directions [n, h, w, 3] whose z in the camera is 1."""
    origin = centres[:, None, None]
    hits = [_plane(origin, directions, *plane) for plane in PLANES]
    hits += [_sphere(origin, directions, *sphere) for sphere in SPHERES]
    return torch.stack(hits).amin(0)


def _plane(origin: Tensor, along: Tensor, normal: tuple[float, ...], offset: float) -> Tensor:
    facing = origin.new_tensor(normal)
    distance = (offset - origin @ facing) / (along @ facing)
    return torch.where(distance > 0, distance, torch.inf)


def _sphere(origin: Tensor, along: Tensor, centre: tuple[float, ...], radius: float) -> Tensor:
    out = origin - origin.new_tensor(centre)
    a, half, c = along.square().sum(-1), (along * out).sum(-1), out.square().sum(-1) - radius**2
    inside = half.square() - a * c
    distance = (-half - inside.clamp_min(0).sqrt()) / a
    return torch.where((inside > 0) & (distance > 0), distance, torch.inf)


def all_pairs(views: int) -> Tensor:
    """Every ordered pair of views, [m, 2]."""
    return Complete().edges(torch.zeros(views, 3, 2, 2))


def auc(score: Tensor, positive: Tensor) -> float:
    """The chance that a positive scores above a negative, ties counted half."""
    _, places, counts = score.flatten().unique(return_inverse=True, return_counts=True)
    middle = counts.cumsum(0) - (counts - 1) / 2  # the mean rank of equal scores
    ranks, chosen = middle[places].double(), positive.flatten()
    n, m = int(chosen.sum()), int((~chosen).sum())
    return float((ranks[chosen].sum() - n * (n + 1) / 2) / (n * m))
