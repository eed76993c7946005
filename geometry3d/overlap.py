"""How much of what a view shows other views show, too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .cameras import inverse_poses, moved, pixels_of
from .reconstruction import Reconstruction


def overlap(scene: Reconstruction, tolerance: float = 0.05) -> Tensor:
    """[n, n]: the share of view i's measured pixels that view j shows; 1 on the diagonal.

    A pixel's point is seen by j where it falls into j's image and j's depth there (interpolated)
    is the point's, to within `tolerance` of it: what something hides does not count.
    """
    n, h, w = scene.depths.shape
    measured = (scene.depths.isfinite() & (scene.depths > 0)).flatten(1)
    points = scene.points().reshape(1, -1, 3)
    shares = []
    for j, into in enumerate(inverse_poses(scene.poses)):
        place, depth = pixels_of(moved(points, into)[0], scene.focals[j], h, w)
        grid = (2 * place / place.new_tensor([w, h]) - 1).nan_to_num(2.0, 2.0, 2.0)
        there = F.grid_sample(scene.depths[j][None, None], grid[None, None], align_corners=False)
        seen = (grid.abs() <= 1).all(-1) & ((there.view(-1) - depth).abs() < tolerance * depth)
        shares.append((seen.view(n, -1) & measured).sum(1) / measured.sum(1).clamp_min(1))
    return torch.stack(shares, 1)
