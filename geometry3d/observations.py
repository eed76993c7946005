"""Predictions sorted by the view they speak of, ready for an alignment."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.errors import AdaptError
from .pointmaps import Pair
from .predictions import Predictions
from .weights import Calibrated, Fixed

# A map of fewer points that count says nothing: a handful may lie on a line.
LEAST = 8
# Farther is no place: 32 bits hold neither its square nor a sum over a map of such squares.
FARTHEST = 1e9


@dataclass(frozen=True, eq=False)
class Observations:
    """Every pair speaks of two views: k = 2 m maps of p pixels, those of one view side by side.

    So each view's maps are a slice and each sum over them has one order: results do not change
    from run to run, on a GPU neither.
    """

    points: Tensor  # [k, p, 3], finite
    initial: Tensor  # [k, p], the weights before any residual is known
    weights: Tensor  # [k, p], the weights as they are now
    edge: Tensor  # [k], which pair
    slices: tuple[slice, ...]  # per view
    place: Tensor  # [m, 2], where the two maps of each pair are

    @property
    def views(self) -> int:
        """How many views there are."""
        return len(self.slices)

    def weighted(self, weights: Tensor) -> Observations:
        """The same maps with other weights."""
        return replace(self, weights=weights)

    def by_edge(self, values: Tensor) -> Tensor:
        """Values [k, ...] as [m, 2, ...]: the pair's own view and the other."""
        return values[self.place]


def observe(predictions: Predictions, rule: Calibrated | Fixed) -> Observations:
    """Sort the maps by view and weigh them; points that are not finite get the weight 0.

    So do points farther than `FARTHEST` along an axis, and all points of a map with fewer than
    `LEAST` points of any weight.

    Raises AdaptError where some view is in no pair as the first: its camera is then unknown.
    """
    pair = predictions.pair
    edges = predictions.edges.to(pair.points1.device)
    _require_every_view_first(edges)
    view = edges.flatten()  # observation 2 e + s is side s of pair e
    order = view.argsort(stable=True)
    points, confidence = _interleaved(pair, order)
    finite = (points.abs() <= FARTHEST).all(-1)
    initial = rule.initial(confidence) * finite
    initial = initial * ((initial > 0).sum(1, keepdim=True) >= LEAST)
    ends = torch.bincount(view).cumsum(0).tolist()
    return Observations(
        points=points.masked_fill_(~finite[..., None], 0),
        initial=initial,
        weights=initial,
        edge=order // 2,
        slices=tuple(slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)),
        place=order.argsort().view(-1, 2),
    )


def _interleaved(pair: Pair, order: Tensor) -> tuple[Tensor, Tensor]:
    points = torch.stack([pair.points1, pair.points2], 1).flatten(0, 1).flatten(1, 2)
    confidence = torch.stack([pair.confidence1, pair.confidence2], 1).flatten(0, 1).flatten(1)
    return points[order], confidence[order]


def _require_every_view_first(edges: Tensor) -> None:
    n = int(edges.max()) + 1
    missing = sorted({*range(n)} - {*edges[:, 0].tolist()})
    if missing:
        raise AdaptError(f"no pair begins with view {missing[0]}: ask about pairs in both orders")
