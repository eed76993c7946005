"""What a pair's pointmaps should be, according to an aligned or a known scene."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import AdaptError
from .alignment import Alignment
from .cameras import camera_points, inverse_poses, moved
from .reconstruction import Reconstruction

CUT = 1.5


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


def pseudo_labels(alignment: Alignment, cut: float = CUT) -> Labels:
    """Labels for every pair of an alignment, from the aligned scene (LoRA3D, arXiv 2412.07746).

    X~ = T_i^-1 T_v [D_v (u / f, v / f, 1)] for both views v of the pair (i, j), kept where the
    pair's calibrated weight there is above `cut`, which is in the weight's space: under log, 1.5
    means a confidence of 4.48 that nothing contradicts. What moves, or what the network got wrong
    in this pair alone, has lost its weight.

    Raises AdaptError where nothing is kept.
    """
    valid = alignment.weights > cut
    if not valid.any():
        highest = float(alignment.weights.max())
        raise AdaptError(f"no label: the highest weight is {highest:.3g}, the cut {cut:g}")
    return _labels(
        camera_points(alignment.depths, alignment.focals), alignment.poses, alignment.edges, valid
    )


def true_labels(scene: Reconstruction, edges: Tensor) -> Labels:
    """Labels for pairs [m, 2] of a scene that is known; they hold where a depth was measured."""
    measured = scene.depths.isfinite() & (scene.depths > 0)
    points = camera_points(torch.where(measured, scene.depths, 0.0), scene.focals)
    return _labels(points, scene.poses, edges, measured[edges])


def _labels(points: Tensor, poses: Tensor, edges: Tensor, valid: Tensor) -> Labels:
    """From points in their own cameras' frames [n, h, w, 3]; `valid` [m, 2, h, w]."""
    first, second = edges.T
    into_first = inverse_poses(poses[first]) @ poses[second]
    other = moved(points[second], into_first)
    return Labels(points[first], valid[:, 0], other, valid[:, 1])
