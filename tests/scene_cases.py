"""What two views of a scene show of the same points."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from polyadapt.geometry3d.cameras import inverse_poses, moved, pixels_of
from polyadapt.geometry3d.reconstruction import Reconstruction


def differences(scene: Reconstruction) -> tuple[Tensor, Tensor]:
    """How much the colours of view 0 differ from view 1's at the same points, and elsewhere."""
    _, h, w = scene.depths.shape
    local = moved(scene.points()[:1], inverse_poses(scene.poses[1:2]))
    place, depth = pixels_of(local.view(1, -1, 3), scene.focals[1:2], h, w)
    grid = (2 * place[0] / torch.tensor([w, h]) - 1)[None, None]
    there = F.grid_sample(
        torch.cat([scene.images[1], scene.depths[1:2]])[None], grid, align_corners=False
    )[0, :, 0]
    seen = (grid.abs() < 0.95).all(-1)[0, 0] & ((there[3] - depth[0]).abs() < 0.01 * depth[0])
    mine = scene.images[0].flatten(1)
    return (mine - there[:3])[:, seen].abs(), (mine - there[:3].roll(100, 1))[:, seen].abs()
