"""DUSt3R's loss on pointmaps, weighed by the network's confidence."""

from __future__ import annotations

import torch
from torch import Tensor

from .labels import Labels
from .pointmaps import Pair

ALPHA = 0.2


def confidence_loss(pair: Pair, labels: Labels, alpha: float = ALPHA) -> Tensor:
    """mean over view 1 of (C l - alpha log C) + the same of view 2; a scalar, differentiable.

    l = |X / z - X~ / z~| per pixel, z and z~ the mean distance to the origin over the valid pixels
    of both views of a pair (DUSt3R, arXiv 2312.14132); the prediction's z has a gradient, too. The
    means are over a batch's valid pixels; a view without any adds 0. Neither the prediction's
    scale nor the labels' changes the loss; a perfect prediction has -alpha mean log C per view.

    >>> points, sure = torch.rand(1, 4, 4, 3) + 1, torch.full((1, 4, 4), 2.0)
    >>> labels = Labels(3 * points, sure > 0, 3 * points, sure > 0)
    >>> round(confidence_loss(Pair(points, sure, points, sure), labels).item(), 4)  # -0.4 log 2
    -0.2773
    """
    total = pair.points1.new_zeros(())
    confidences = (pair.confidence1, pair.confidence2)
    for distance, confidence, valid in zip(
        distances(pair, labels), confidences, (labels.valid1, labels.valid2), strict=True
    ):
        if valid.any():
            sure = confidence[valid]
            total = total + (sure * distance[valid] - alpha * sure.log()).mean()
    return total


def distances(pair: Pair, labels: Labels) -> tuple[Tensor, Tensor]:
    """l of both views, [b, h, w] each; 0 where there is no label."""
    predicted = _by_mean_distance(pair.points1, pair.points2, labels)
    wanted = _by_mean_distance(labels.points1, labels.points2, labels)
    one, two = ((p - q).norm(dim=-1) for p, q in zip(predicted, wanted, strict=True))
    return one, two


def _by_mean_distance(one: Tensor, two: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """Both maps of each pair over their points' mean distance; 0 where there is no label."""
    # Replaced before anything is computed with it: 0 * NaN is NaN, in gradients too.
    one = torch.where(labels.valid1[..., None], one, 0.0)
    two = torch.where(labels.valid2[..., None], two, 0.0)
    count = labels.valid1.flatten(1).sum(1) + labels.valid2.flatten(1).sum(1)
    length = one.norm(dim=-1).flatten(1).sum(1) + two.norm(dim=-1).flatten(1).sum(1)
    mean = (length / count.clamp_min(1)).clamp_min(1e-8)[:, None, None, None]
    return one / mean, two / mean
