"""Scores of a scene that is known: a network alone, aligned, calibrated by itself and the truth."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, fields

import torch
from torch import Tensor

from ..core.recipe import Recipe
from .alignment import align
from .calibration import (
    RECIPE,
    Calibration,
    Schedule,
    Survey,
    Tell,
    calibrate,
    held_out_views,
    survey,
)
from .graph import Graph
from .labels import pseudo_labels, true_labels
from .pointmaps import Pair, PointmapNetwork
from .predictions import Predictions
from .reconstruction import Reconstruction
from .similarity import fit_robustly
from .surfaces import surface_error
from .trajectory import ate, pair_errors
from .view_scores import point_error, true_pairs
from .weights import Calibrated, Fixed

METHODS = ("fixed", "robust", "self", "truth")
_POINTS = 20_000  # of the fit that brings a reconstruction onto the truth


@dataclass(frozen=True)
class Row:
    """One method on one scene; NaN where the truth does not tell.

    pairs:    relative error of the network's own pointmaps on pairs with a held-out view: the mean
              over both views of the mean distance, over the pair's size
    aligned:  the same of the aligned scene, put into these pairs' frames
    ate:      root mean square of the cameras' places, units of the truth
    rra, rta: share of pairs of views less than 15 degrees off in rotation and direction
    auc:      area to 30 degrees of the larger of both
    accuracy, completeness, chamfer: of the points, units of the truth
    focal:    mean error in per cent
    gain:     of a calibration: the share of its validation error that went; 0: the base was kept
    """

    scene: str
    method: str
    pairs: float
    aligned: float
    ate: float
    rra: float
    rta: float
    auc: float
    accuracy: float
    completeness: float
    chamfer: float
    focal: float
    gain: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to compare, and how; `methods` are some of `METHODS`."""

    methods: Sequence[str] = ("fixed", "robust")
    graph: Graph | None = None
    rule: Calibrated = field(default_factory=Calibrated)
    sweeps: int = 100
    schedule: Schedule = field(default_factory=Schedule)
    recipe: Recipe = RECIPE
    hold_out: int | None = None
    cut: float | None = None
    seed: int = 0


def compared(
    network: PointmapNetwork,
    truth: Reconstruction,
    at: Iterable[str],
    scene: str,
    wanted: Wanted,
    focals: Tensor | None = None,
    tell: Tell | None = None,
) -> Iterator[Row]:
    """The rows of one scene, method by method; the network ends as it was.

    All views are aligned; `wanted.hold_out` of them train nothing. "fixed" is DUSt3R's plain
    alignment, "robust" LoRA3D's without training, "self" with self-calibration where that helps,
    "truth" trains on the true pointmaps: what calibration could reach.
    """
    rule, sites = wanted.rule, list(at)
    held_out = held_out_views(len(truth), wanted.hold_out)  # refuses before anything is computed

    def seen_now() -> Survey:
        return survey(network, truth.images, wanted.graph, rule, focals, wanted.sweeps, tell)

    base = seen_now()
    for method in wanted.methods:
        gain = math.nan
        seen, alignment = base, base.alignment
        if method == "fixed":
            fixed = Fixed(rule.space)
            alignment = align(base.predictions, fixed, wanted.sweeps, focals=focals)
        elif method != "robust":
            found = _trained(network, base, truth, sites, wanted, method == "truth", tell)
            gain = found.gain if found.adapters is not None else 0.0
            if found.adapters is not None:
                seen = seen_now()
                alignment = seen.alignment
                found.adapters.detach()
        scores = score(
            seen.predictions,
            alignment.reconstruction(truth.images, truth.names),
            truth,
            held_out,
        )
        yield Row(scene=scene, method=method, gain=gain, **scores)


def _trained(
    network: PointmapNetwork,
    base: Survey,
    truth: Reconstruction,
    sites: Sequence[str],
    wanted: Wanted,
    by_truth: bool,
    tell: Tell | None,
) -> Calibration:
    edges = base.predictions.edges
    labels = true_labels(truth, edges) if by_truth else pseudo_labels(base.alignment, wanted.cut)
    return calibrate(
        network,
        base,
        sites,
        schedule=wanted.schedule,
        recipe=wanted.recipe,
        labels=labels,
        judge=labels,
        hold_out=wanted.hold_out,
        seed=wanted.seed,
        tell=tell,
    )


def score(
    predictions: Predictions,
    found: Reconstruction,
    truth: Reconstruction,
    held_out: Sequence[int],
) -> dict[str, float]:
    """The numbers of a `Row`, from `pairs` to `focal`, by their names."""
    edges = predictions.edges
    tests = (edges[:, :, None] == edges.new_tensor(held_out)).any((1, 2))
    said = Pair(*(part[tests] for part in predictions.pair))
    right = true_pairs(truth, edges[tests])
    poses = pair_errors(found.poses.cpu(), truth.poses.cpu())
    return {
        "pairs": _relative(said, right),
        "aligned": _relative(true_pairs(found, edges[tests]), right),
        "ate": ate(found.poses.cpu(), truth.poses.cpu()).rmse,
        "rra": poses.rra(15),
        "rta": poses.rta(15),
        "auc": poses.auc(30),
        **_surfaces(found, truth),
        "focal": _focal(found, truth),
    }


def _relative(said: Pair, right: Pair) -> float:
    """NaN where no depth is known."""
    off = point_error(said, right)
    relative = torch.stack([off.own, off.other]) / off.size
    return float(relative[relative.isfinite()].mean())


def _surfaces(found: Reconstruction, truth: Reconstruction) -> dict[str, float]:
    """Accuracy, completeness, Chamfer, after a robust similarity over the pixels of both."""
    both = found.shown() & truth.shown()
    if both.sum() < 3:
        return dict.fromkeys(("accuracy", "completeness", "chamfer"), math.nan)
    estimated, true = found.points(), truth.points()
    stride = max(1, int(both.sum()) // _POINTS)
    source, target = estimated[both][::stride], true[both][::stride]
    fit = fit_robustly(source, target, torch.ones_like(source[:, 0]))
    off = surface_error(fit.apply(estimated[found.shown()]), true[truth.shown()])
    return {
        "accuracy": off.accuracy,
        "completeness": off.completeness,
        "chamfer": off.chamfer,
    }


def _focal(found: Reconstruction, truth: Reconstruction) -> float:
    """In per cent, so that it is the same in pixels of views and of images; NaN if not known."""
    return float(100 * ((found.focals - truth.focals).abs() / truth.focals).mean())


def table(rows: Sequence[Row]) -> str:
    """The rows as text, a column each; a dash where the truth does not tell."""
    names = [column.name for column in fields(Row)]
    cells = [names, *([_cell(value) for value in astuple(row)] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return "-" if math.isnan(value) else f"{value:.4g}"


def as_csv(rows: Sequence[Row]) -> bytes:
    """The rows as CSV, NaN as an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(column.name for column in fields(Row))
    for row in rows:
        values = astuple(row)
        writer.writerow("" if isinstance(v, float) and math.isnan(v) else v for v in values)
    return text.getvalue().encode()
