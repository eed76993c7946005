"""Can alignment help? What differs between a view's partners against what stays with all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .alignment import Alignment
from .cameras import inverse_poses, moved, pixels_of, world_points
from .predictions import Predictions
from .reconstruction import Reconstruction
from .similarity import Similarity, fit_robustly

TOO_LOW = 0.3  # spread over bias: the rule then predicts a gain below 5 %
# Two depths further apart than this many times the median difference are two surfaces.
OTHER_SURFACE = 5.0


@dataclass(frozen=True)
class Diagnosis:
    """Relative errors (shares of the depth) of a network on one scene: root mean squares where
    the truth is known, else medians' equivalents.

    spread: of a view's points over its partners: independent errors, which alignment averages out
    bias:   of the mean over the partners: what is wrong in the same way with every partner stays
    known:  the bias is measured against the truth; else guessed from what the views contradict
            each other in
    """

    spread: float
    bias: float
    known: bool

    @property
    def ratio(self) -> float:
        """Spread over bias."""
        return self.spread / self.bias if self.bias > 0 else math.inf

    @property
    def predicted_gain(self) -> float:
        """1 - 1 / sqrt(1 + (spread / bias)^2): how much smaller the error is without the spread.

        >>> round(Diagnosis(spread=0.03, bias=0.04, known=True).predicted_gain, 3)
        0.2
        """
        return 1 - 1 / math.hypot(1, self.ratio)

    def __str__(self) -> str:
        spread = f"spread over partners {self.spread:.3f}"
        if not self.known and not self.bias:
            return f"{spread}, common bias not seen beside it: no gain can be predicted"
        source = "against the truth" if self.known else "as far as views contradict each other"
        gain = f"predicted gain {self.predicted_gain:.0%}"
        text = f"{spread}, common bias {self.bias:.3f} ({source}): {gain}"
        if self.ratio >= TOO_LOW:
            return text
        return f"{text}; spread/bias below {TOO_LOW} leaves calibration little to learn from"


def diagnose(predictions: Predictions, alignment: Alignment) -> Diagnosis:
    """Spread and a guess of the bias, without knowing the truth.

    Spread: every pair's points in the aligned world; per pixel the deviation from the mean over
    the K pairs that show it, sqrt(sum |Y_k - mean Y|^2 / (K - 1)) over the depth; the median over
    the pixels, as the bias comes from medians, too: a few pairs that are all wrong would make the
    one look large beside the other. The pairs' similarities have taken up a part of it.

    Bias: without the truth it shows only where views contradict each other. A view's point, moved
    into another view, lies at a depth z that this view's own map denies by a share d. Were the
    errors of two views independent and alike in all directions, Var d = 2/3 (bias^2 + spread^2/K);
    solved for the bias, with 1.4826 median |d| as deviation. What all views get wrong alike (a
    common stretch, a shape that bends the same way from everywhere) is in none of these
    differences; what the alignment bent to make them agree, and edges of things, are in. On
    oracles whose bias lies in patches of 6 pixels the guess is within half of it (in the tests);
    smoother errors are guessed too large. `diagnose_with` knows, where a truth is there.
    """
    said = _in_world(predictions, alignment.similarities)
    shown = alignment.weights > 0
    squares, partners = [], []
    for view in range(len(alignment.depths)):
        mine = alignment.edges == view
        square, count = _deviations(said[mine], shown[mine], alignment.depths[view])
        squares.append(square)
        partners.append(count)
    variance, left = torch.cat(squares), torch.cat(squares) / torch.cat(partners)
    spread = math.sqrt(float(variance.median())) if len(variance) else 0.0
    apart, bias = _contradictions(alignment), 0.0
    if len(apart):
        denied = (1.4826 * float(apart.median())) ** 2
        bias = math.sqrt(max(0.0, 1.5 * denied - (float(left.median()) if len(left) else 0.0)))
    return Diagnosis(spread, bias, known=False)


def _deviations(points: Tensor, shown: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
    """Of a view's K maps [K, h, w, 3], where they count [K, h, w] and its depth [h, w].

    (the variances over the maps relative to the depth's square, of how many maps each), for the
    pixels that two maps show at least.
    """
    shown = shown & points.isfinite().all(-1)
    count = shown.sum(0)
    several = (count >= 2) & (depth > 0)
    mean = torch.where(shown[..., None], points, 0.0).sum(0) / count.clamp_min(1)[..., None]
    away = torch.where(shown[..., None], points - mean, 0.0).square().sum((0, -1))
    return (away[several] / (count[several] - 1) / depth[several].square()), count[several]


def diagnose_with(predictions: Predictions, scene: Reconstruction) -> Diagnosis:
    """Spread and bias of predictions about a scene that is known.

    Every pair is brought onto the true points by one robust similarity of its own: its unit and
    place are free, as in an alignment. An alignment may gain more than the rule predicts from
    these: it also takes away what is off across a pixel's ray, common or not. Over the K pairs of
    a view, the mean error of a pixel is its bias (less spread^2 / K, what chance leaves in a
    mean), the deviation from it its spread.
    """
    truth, measured = scene.points(), scene.shown()
    fits = [
        _onto(predictions, edge, truth[pair], measured[pair])
        for edge, pair in enumerate(predictions.edges)
    ]
    joined = (torch.stack([getattr(fit, name) for fit in fits]) for name in _PARTS)
    said = _in_world(predictions, Similarity(*joined))
    total = _Sums()
    for view in range(len(scene)):
        mine = predictions.edges == view
        errors = said[mine] - truth[view]
        total.add(errors, measured[view].expand(errors.shape[:-1]), scene.depths[view])
    return Diagnosis(total.spread(), total.bias(), known=True)


_PARTS = ("scale", "rotation", "translation")


class _Sums:
    """Squares relative to the depth, each counted as 1 at most, over pixels of all views."""

    def __init__(self) -> None:
        self.pixels, self.partners = 0.0, 0.0
        self.deviation, self.mean = 0.0, 0.0

    def add(self, points: Tensor, shown: Tensor, depth: Tensor) -> None:
        """One view: its K maps [K, h, w, 3], where they count [K, h, w], its depth [h, w]."""
        shown = shown & points.isfinite().all(-1)
        points = torch.where(shown[..., None], points, 0.0)
        count = shown.sum(0)
        mean = points.sum(0) / count.clamp_min(1)[..., None]
        away = torch.where(shown[..., None], points - mean, 0.0).square().sum((0, -1))
        several = (count >= 2) & (depth > 0)
        unit = depth[several].square()
        self.deviation += float((away[several] / (count[several] - 1) / unit).clamp_max(1).sum())
        self.mean += float((mean[several].square().sum(-1) / unit).clamp_max(1).sum())
        self.partners += float(count[several].sum())
        self.pixels += float(several.sum())

    def spread(self) -> float:
        """0 where no pixel has two partners."""
        return math.sqrt(self.deviation / max(self.pixels, 1))

    def remaining(self) -> float:
        """The square of the spread that a mean over the partners still has."""
        return self.deviation / max(self.partners, 1)

    def bias(self) -> float:
        """Of errors: the root mean square of their means, less what chance leaves in these."""
        return math.sqrt(max(0.0, self.mean / max(self.pixels, 1) - self.remaining()))


def _in_world(predictions: Predictions, similarities: Similarity) -> Tensor:
    """All maps moved by their pairs' similarities, [m, 2, h, w, 3]."""
    both = torch.stack([predictions.pair.points1, predictions.pair.points2], 1)
    return similarities.apply(both.flatten(1, 3)).view_as(both)


def _onto(predictions: Predictions, edge: int, truth: Tensor, measured: Tensor) -> Similarity:
    said = torch.stack([predictions.pair.points1[edge], predictions.pair.points2[edge]])
    counted = measured & said.isfinite().all(-1)
    source, target = said[counted], truth[counted]
    return fit_robustly(source, target, torch.ones_like(source[:, 0]))


def _contradictions(alignment: Alignment) -> Tensor:
    """|d - z| / z of views' points at depth z in their partners, whose own maps say d."""
    height, width = alignment.depths.shape[1:]
    world = world_points(alignment.depths, alignment.focals, alignment.poses)
    found = []
    for i, j in alignment.edges.tolist():
        local = moved(world[i], inverse_poses(alignment.poses[j]))
        place, z = pixels_of(local.flatten(0, 1), alignment.focals[j], height, width)
        grid = (2 * place / place.new_tensor([width, height]) - 1).nan_to_num(2.0)
        there = F.grid_sample(
            alignment.depths[j][None, None], grid[None, None], align_corners=False
        ).flatten()
        inside = (grid.abs() <= 1).all(-1)
        found.append(((there - z).abs() / z)[inside])
    apart = torch.cat(found)
    return apart[apart < OTHER_SURFACE * apart.median()] if len(apart) else apart
