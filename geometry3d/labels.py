"""What a pair's pointmaps should be, according to an aligned or a known scene."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import AdaptError
from .alignment import Alignment
from .cameras import camera_points, inverse_poses, moved
from .reconstruction import Reconstruction
from .view_scores import true_pairs


class Labels(NamedTuple):
    """Targets for b pairs, both in the first camera's frame, and where they hold."""

    points1: Tensor  # [b, h, w, 3]
    valid1: Tensor  # [b, h, w] bool
    points2: Tensor  # [b, h, w, 3]
    valid2: Tensor  # [b, h, w] bool

    def share(self) -> float:
        """How much of the pixels has a label."""
        return float(torch.stack([self.valid1, self.valid2]).float().mean())

    def chosen(self, index: Tensor) -> Labels:
        """Some of the pairs."""
        return Labels(*(part[index] for part in self))


def pseudo_labels(alignment: Alignment, cut: float | None = None) -> Labels:
    """Labels for every pair of an alignment, from the aligned scene (LoRA3D, arXiv 2412.07746).

    X~ = T_i^-1 T_v [D_v (u / f, v / f, 1)] for both views v of the pair (i, j), kept where the
    calibrated weight of the view's pixel, the mean over its pairs, is above `cut` (None:
    `usual_cut`) and the pair itself was not so unsure that it counts for nothing there. What
    moves, or what the views cannot agree on, has lost its weight.

    The mean and not the pair's own weight, our choice (the notes on the paper leave it open): the
    label is what all pairs together say of the view, and a pair that they all contradict has the
    most to learn from it; where its own weight is high, label and prediction are the same.

    Raises AdaptError where nothing is kept.
    """
    cut = usual_cut(alignment) if cut is None else cut
    agreed = torch.stack(
        [alignment.weights[alignment.edges == view].mean(0) for view in range(len(alignment.poses))]
    )
    valid = (agreed > cut)[alignment.edges] & (alignment.weights > 0)
    if not valid.any():
        raise AdaptError(f"no label: the highest weight is {float(agreed.max()):.3g}, cut {cut:g}")
    first, second = alignment.edges.T
    points = camera_points(alignment.depths, alignment.focals)
    into_first = inverse_poses(alignment.poses[first]) @ alignment.poses[second]
    return Labels(points[first], valid[:, 0], moved(points[second], into_first), valid[:, 1])


def usual_cut(alignment: Alignment) -> float:
    """A quarter of the mean weight before any residual was known: what a residual of mu leaves.

    The paper's cut is 1.5, with a mu that is not known to us. Under mu = the median residual, the
    default here, a typical point keeps C / 4: with log C as C, 1.5 would ask of it a confidence of
    exp(6) = 403.
    """
    lost = (1 + alignment.residuals / alignment.mu).square()
    return float((alignment.weights * lost).mean()) / 4


def true_labels(scene: Reconstruction, edges: Tensor) -> Labels:
    """`true_pairs` as labels for pairs [m, 2]; they hold where a depth is known."""
    pair = true_pairs(scene, edges)
    known = pair.confidence1 > 0, pair.confidence2 > 0
    one, two = (
        torch.where(valid[..., None], points, 0.0)
        for valid, points in zip(known, (pair.points1, pair.points2), strict=True)
    )
    return Labels(one, known[0], two, known[1])
