"""How well what is found about single views and pairs fits: depth, focal, pointmaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import AdaptError
from .cameras import camera_points, inverse_poses, moved
from .pointmaps import Pair
from .reconstruction import Reconstruction


@dataclass(frozen=True)
class DepthError:
    """`abs_rel`: mean |d - d*| / d*; `delta`: the share with max(d / d*, d* / d) < 1.25."""

    abs_rel: float
    delta: float
    scale: float


def depth_error(
    depths: Tensor, truth: Tensor, scale: Literal["median", "least_squares", "none"] = "median"
) -> DepthError:
    """Depths [...] against true ones, where both are measured (finite and above 0).

    Before, the estimate is multiplied by median(d*) / median(d), by sum(d d*) / sum(d^2) or, for
    metric estimates, by nothing. Means are over pixels of all views together.

    Raises AdaptError where the shapes differ or no pixel is measured in both.

    >>> depth_error(torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 4, 12])).abs_rel
    0.1666666716337204
    """
    if depths.shape != truth.shape:
        raise AdaptError(f"depths {list(depths.shape)} cannot be scored by {list(truth.shape)}")
    both = (depths > 0) & (truth > 0) & depths.isfinite() & truth.isfinite()
    if not both.any():
        raise AdaptError("no pixel has a depth in both the estimate and the truth")
    d, t = depths[both], truth[both]
    if scale == "median":
        s = t.median() / d.median()
    else:
        s = (d * t).sum() / d.square().sum() if scale == "least_squares" else d.new_ones(())
    d = s * d
    within = torch.maximum(d / t, t / d) < 1.25
    return DepthError(float(((d - t).abs() / t).mean()), float(within.float().mean()), float(s))


def focal_error(focals: Tensor, truth: Tensor) -> tuple[float, float]:
    """AFE: (mean |f - f*| / f* in per cent, mean |f - f*| in pixels) of focals [n], [n].

    The source prints per cent in one table and leaves the unit open in another; so both. Pixels
    are those of the original images: divide a focal by its view's scale before.

    Raises AdaptError where the numbers of views differ.

    >>> focal_error(torch.tensor([110.0, 200.0]), torch.tensor([100.0, 200.0]))
    (5.0, 5.0)
    """
    if focals.shape != truth.shape or focals.ndim != 1 or len(focals) == 0:
        raise AdaptError(f"focals {list(focals.shape)} cannot be scored by {list(truth.shape)}")
    off = (focals.double() - truth.double()).abs()
    return float(100 * (off / truth.double()).mean()), float(off.mean())


def true_pairs(scene: Reconstruction, edges: Tensor) -> Pair:
    """The right answers to pairs of views `edges` [b, 2] of a known scene.

    Confidences are the scene's weights, 0 where there is no depth.
    """
    i, j = edges.unbind(1)
    local = camera_points(scene.depths, scene.focals)
    across = inverse_poses(scene.poses[i]) @ scene.poses[j]
    weights = torch.where(scene.shown(), scene.weights, 0.0)
    return Pair(local[i], weights[i], moved(local[j], across), weights[j])


@dataclass(frozen=True, eq=False)
class PointError:
    """Mean distances of b pairs' points, in the first view and in the second: units of the truth.

    `size` is the mean distance of a pair's true points from the first camera: divided by it the
    errors are relative.
    """

    own: Tensor  # [b]
    other: Tensor  # [b]
    size: Tensor  # [b]


def point_error(pair: Pair, truth: Pair) -> PointError:
    """A pair's pointmaps against true ones; pixels with a true confidence of 0 are left out.

    The estimate is multiplied by z* / z before, z being the mean distance to the first camera over
    both views' valid pixels, as in DUSt3R's loss (arXiv 2312.14132). How the paper of LoRA3D
    aligns before its table of pairwise errors is not known; this is our choice. An error is NaN
    where a view has no valid pixel.
    """
    valid = (truth.confidence1 > 0, truth.confidence2 > 0)
    found, wanted = _mean_distance(pair, valid), _mean_distance(truth, valid)
    scale = (wanted / found)[:, None, None, None]
    own = (scale * pair.points1 - truth.points1).norm(dim=-1)
    other = (scale * pair.points2 - truth.points2).norm(dim=-1)
    return PointError(_mean(own, valid[0]), _mean(other, valid[1]), wanted)


def _mean_distance(pair: Pair, valid: tuple[Tensor, Tensor]) -> Tensor:
    both = [x.norm(dim=-1).flatten(1) for x in (pair.points1, pair.points2)]
    return _mean(torch.cat(both, 1), torch.cat([mask.flatten(1) for mask in valid], 1))


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """[b, ...] -> [b], over the pixels of the mask."""
    total = torch.where(mask, values, 0.0).flatten(1).sum(1)
    return total / mask.flatten(1).sum(1)
