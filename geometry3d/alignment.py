"""Robust global alignment: one scene that agrees with all pairs' pointmaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..core.errors import AdaptError
from .alignment_steps import OUT_OF_RANGE, reseat, residuals, sweep
from .cameras import pose
from .geometry import Geometry
from .observations import Observations, observe
from .predictions import Predictions, one_line_if_out_of_memory
from .reconstruction import Reconstruction
from .similarity import Similarity
from .start import start
from .weights import Calibrated, Fixed

Progress = Callable[[int, int, float], None]  # sweeps done, of how many, the median residual

STEPS, REFRESH = 100, 10
# Residuals below this share of the median depth are rounding: mu stays above it.
ROUNDING = 1e-5
# The share of the sweeps in which the width falls from the start's mean residual to rounding.
NARROWING = 0.8
# Of the median residual: how long a residual must be to count as a length and not as a square.
SOFTENING = 0.3


@dataclass(frozen=True, eq=False)
class Alignment:
    """What an alignment found, lengths in its own unit: the pairs' scales, each as much as its
    weights, have the geometric mean 0.5.

    poses [n, 4, 4] (camera to world), focals [n], depths [n, h, w]; the pairs `edges` [m, 2] with
    their similarities into the world (batched over m), and for their two views the weights
    [m, 2, h, w] as they were last and the residuals' lengths [m, 2, h, w]; `mu`, the length at
    which a weight has fallen to a quarter.
    """

    poses: Tensor
    focals: Tensor
    depths: Tensor
    edges: Tensor
    similarities: Similarity
    weights: Tensor
    residuals: Tensor
    mu: float

    def reconstruction(self, images: Tensor, names: Sequence[str]) -> Reconstruction:
        """The scene; a depth's weight is the mean of its view's pairs' weights."""
        weights = torch.zeros_like(self.depths)
        for view in range(len(self.depths)):
            weights[view] = self.weights[self.edges == view].mean(0)
        return Reconstruction(self.poses, self.focals, self.depths, weights, images, names)


def align(
    predictions: Predictions,
    rule: Calibrated | Fixed | None = None,
    steps: int = STEPS,
    refresh: int = REFRESH,
    focals: Tensor | None = None,
    progress: Progress | None = None,
) -> Alignment:
    """Find poses, focals, depths and the pairs' scales with the least sum of w e.

    With e = |T_v D (u / f, v / f, 1) - s_e T_e X| the distance between a view's point in the world
    and what a pair predicted of it. `rule` says what w is: `Calibrated()` (None) lets weights fall
    where the views contradict each other, w = C / (1 + e / mu)^2, refreshed every `refresh`
    sweeps (LoRA3D, arXiv 2412.07746); `Fixed()` keeps log C, DUSt3R's alignment. `focals` [n],
    where known, stay. Runs where the predictions are; no chance is in it.

    The papers descend with Adam (300 steps of 0.01), which leaves even an exact start. Ours, by
    choice: `steps` sweeps of `alignment_steps`, closed forms that cannot raise the cost and keep
    an exact start exact; after `start`'s spanning tree they need no learning rate. The cost is
    not smooth where residuals vanish, and sweeps that move one camera or pair at a time get stuck
    there: once most maps agree exactly, they hold the others where they are. So lengths and
    weights are first seen through a wide `width`, which narrows in proportion from sweep to sweep
    (graduated non-convexity): it is added to mu, and is the least softening. More sweeps narrow
    more slowly, which is what helps where depth and focal can hardly be told apart.

    Raises AdaptError where the pairs do not hold all views together, the memory not the maps, or
    32 bits not the numbers.
    """
    if steps < 0 or refresh < 1:
        raise AdaptError(f"{steps} sweeps, refreshed every {refresh}: at least 0 and 1")
    if focals is not None and focals.shape != (predictions.views,):
        raise AdaptError(f"{list(focals.shape)} focals for {predictions.views} views")
    if focals is not None and not (focals.isfinite() & (focals > 0)).all():
        raise AdaptError(f"focals {focals.tolist()}: pixels, above 0 and finite")
    height, width = predictions.size
    doing = f"aligning {len(predictions.edges)} pairs of {width}x{height} pixels"
    mend = "move the predictions to the CPU, or take smaller images or fewer pairs"
    with torch.no_grad(), one_line_if_out_of_memory(doing, mend):
        try:
            return _aligned(predictions, rule or Calibrated(), steps, refresh, focals, progress)
        except LinAlgError:  # of numbers that are not finite
            raise AdaptError(f"the alignment has no solution: {OUT_OF_RANGE}") from None


def _aligned(
    predictions: Predictions,
    rule: Calibrated | Fixed,
    steps: int,
    refresh: int,
    focals: Tensor | None,
    progress: Progress | None,
) -> Alignment:
    seen = observe(predictions, rule)
    geometry = start(seen, predictions.size, focals)
    floor = ROUNDING * float(geometry.depths.median())
    mu = rule.mu if isinstance(rule, Calibrated) else None
    typical, widest = floor, max(floor, _mean(residuals(seen, geometry), seen.initial))
    for step in range(steps):
        width = widest * (floor / widest) ** min(1.0, step / (NARROWING * steps))
        if step % refresh == 0:
            lengths = residuals(seen, geometry)
            typical = max(_median(lengths, seen.initial), floor)
            if step:
                mu = mu or typical
                seen = seen.weighted(rule.refreshed(seen.initial, lengths, mu + width))
                reseat(seen, geometry, max(SOFTENING * typical, width), focals is not None)
        sweep(seen, geometry, max(SOFTENING * typical, width), focals is not None)
        if progress:
            progress(step + 1, steps, typical)
    return _finished(predictions, rule, seen, geometry, mu or typical)


def _finished(
    predictions: Predictions,
    rule: Calibrated | Fixed,
    seen: Observations,
    geometry: Geometry,
    mu: float,
) -> Alignment:
    """The world moved into the first view's frame, and the maps back in the pairs' order."""
    geometry.begin_at(0)
    lengths = residuals(seen, geometry)
    height, width = predictions.size
    last = rule.refreshed(seen.initial, lengths, mu)
    if not all(part.isfinite().all() for part in (geometry.rotations, geometry.depths, lengths)):
        raise AdaptError(f"the alignment has no solution: {OUT_OF_RANGE}")
    return Alignment(
        poses=pose(geometry.rotations, geometry.centres),
        focals=geometry.focals,
        depths=geometry.depths.unflatten(1, (height, width)),
        edges=predictions.edges,
        similarities=geometry.similarities,
        weights=seen.by_edge(last).unflatten(2, (height, width)),
        residuals=seen.by_edge(lengths).unflatten(2, (height, width)),
        mu=mu,
    )


def _median(lengths: Tensor, weights: Tensor) -> float:
    """The median length of what has weight, from at most about a million of them."""
    stride = max(1, lengths.numel() // 2**20)
    some, counted = lengths.flatten()[::stride], weights.flatten()[::stride] > 0
    return float(some[counted].median()) if counted.any() else 0.0


def _mean(lengths: Tensor, weights: Tensor) -> float:
    """The mean length of what has weight."""
    return float(lengths[weights > 0].mean())
