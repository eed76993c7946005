"""The focal length that a pointmap in its own camera's frame implies (Weiszfeld)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import AdaptError
from .cameras import centred_pixels

STEPS = 20


def focal_of(points: Tensor, weights: Tensor | None = None, steps: int = STEPS) -> Tensor:
    """argmin over f of sum w |(u, v) - f (x, y) / z|, in pixels of the map; a scalar.

    `points` [h, w, 3] or several maps of one camera [k, h, w, 3], `weights` [h, w] or [k, h, w] of
    at least 0 (None: all alike; LoRA3D, arXiv 2412.07746, weighs by confidence). The sum is of
    distances and not of squares, so outliers pull little; it is found by reweighting least squares
    with 1 / distance. Points that are not finite or not in front of the camera do not count.

    Raises AdaptError where no point counts, all lie on the optical axis, or most lie on the wrong
    side of it, so that no positive focal length fits.

    >>> from .cameras import camera_points
    >>> round(focal_of(camera_points(torch.rand(6, 8) + 1, torch.tensor(10.0))).item(), 3)
    10.0
    """
    height, width = points.shape[-3:-1]
    slopes = points[..., :2] / points[..., 2:]
    seen = points.isfinite().all(-1) & slopes.isfinite().all(-1) & (points[..., 2] > 0)
    weights = torch.ones_like(points[..., 0]) if weights is None else weights
    counted = seen & (weights > 0)
    pixels = centred_pixels(height, width, points).expand_as(slopes)[counted]
    slopes, weights = slopes[counted], weights[counted]
    if not slopes.square().sum() > 0:
        raise AdaptError(f"no focal length: {int(counted.sum())} of the map's points tell one")
    focal = _reweighted(pixels, slopes, weights, steps)
    if not focal > 0:
        raise AdaptError("no focal length: none above 0 fits the map")
    return focal


def _reweighted(pixels: Tensor, slopes: Tensor, weights: Tensor, steps: int) -> Tensor:
    across, along = (pixels * slopes).sum(-1), slopes.square().sum(-1)
    focal = (weights * across).sum() / (weights * along).sum()
    for _ in range(steps):
        distance = (pixels - focal * slopes).norm(dim=-1).clamp_min(1e-6)
        closer = weights / distance
        focal = (closer * across).sum() / (closer * along).sum()
    return focal
