"""Robust alignment alone, on oracles that know the scene: against fixed weights, by kind of flaw.

Six views of generated scenes (a furnished room, a heightfield, boxes), all 30 ordered pairs, each
in a unit of its own. Both alignments get the same answers; `fixed` weighs them by log C (DUSt3R's
rule), `robust` recalibrates the weights (LoRA3D, arXiv 2412.07746). Focals are unknown unless the
flaw's name says otherwise.

ATE is that of the camera centres after a similarity, as a share of the scene's radius (mean
distance of its points from their mean). Pair errors are mean distances over the pair's mean depth,
its unit fitted. Which pixels are outliers is known exactly: the same oracle without them differs
there only.

Run: python benchmarks/geometry_alignment.py [--seeds 0,1,2] [--views 6] [--width 32] [--sweeps 100]
  [--refresh 10] [--only TEXT]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from polyadapt.benchmarks.rounds import machine, one_thread
from polyadapt.geometry3d.alignment import REFRESH, STEPS, Alignment, align
from polyadapt.geometry3d.confidence_scores import outlier_auc
from polyadapt.geometry3d.graph import Complete
from polyadapt.geometry3d.oracle import Flaws, Oracle
from polyadapt.geometry3d.pointmaps import Pair
from polyadapt.geometry3d.predictions import Predictions
from polyadapt.geometry3d.reconstruction import Reconstruction
from polyadapt.geometry3d.scenes.camouflage import camouflaged
from polyadapt.geometry3d.scenes.rooms import room
from polyadapt.geometry3d.trajectory import ate
from polyadapt.geometry3d.view_scores import focal_error, point_error, true_pairs
from polyadapt.geometry3d.weights import Calibrated, Fixed

EXACT, ONE, FAR, ALL, TOLD, NOISE, KNOWN = (
    "no noise",
    "20 % of one view, surer than the rest",
    "20 % of one view, with 3/5 of its weight",
    "20 % of all views, as sure as the rest",
    "20 % of all views, half told, noise 0.02",
    "noise, mean 0.1",
    "noise, mean 0.1, focals known",
)
CASES = {
    EXACT: Flaws(scales=0.5),
    ONE: Flaws(outliers=0.2, outlier_views=(2,), confidence=3.0, outlier_confidence=100.0),
    FAR: Flaws(outliers=0.2, outlier_views=(2,), confidence=3.0, outlier_confidence=1000.0),
    ALL: Flaws(outliers=0.2),
    TOLD: Flaws(noise=0.02, outliers=0.2, outlier_confidence=5.0, miscalibration=0.7),
    NOISE: Flaws(noise=0.12),  # the root mean square; the mean length is 0.1
    KNOWN: Flaws(noise=0.12),
}
RULES: dict[str, Calibrated | Fixed] = {"fixed": Fixed(), "robust": Calibrated()}
Drawn = Callable[[int, int, tuple[int, int]], Reconstruction]  # seed, views, size


def _camouflaged(kind: int, seed: int, views: int, size: tuple[int, int]) -> Reconstruction:
    return camouflaged(10**6 + 2 * seed + kind, views, size)


def _room(seed: int, views: int, size: tuple[int, int]) -> Reconstruction:
    return room(seed, "day", views, size)


SCENES: dict[str, Drawn] = {
    "room": _room,
    "heightfield": partial(_camouflaged, 0),
    "boxes": partial(_camouflaged, 1),
}


@dataclass(frozen=True)
class Row:
    """One alignment; pair errors in the own view and in the other one, before and after it."""

    case: str
    scene: str
    seed: int
    rule: str
    ate: float
    focal: float  # mean error in per cent
    own_before: float
    other_before: float
    own: float
    other: float
    weight_auc: float  # NaN without outliers
    confidence_auc: float


def row(
    case: str,
    scene: str,
    seed: int,
    rule: str,
    truth: Reconstruction,
    steps: int = STEPS,
    refresh: int = REFRESH,
) -> Row:
    """Align one oracle's answers about all pairs of a scene, and score that."""
    edges = Complete().edges(truth.images)
    said = Oracle(truth, CASES[case], seed).predictions(edges)
    focals = truth.focals if case == KNOWN else None
    found = align(said, RULES[rule], steps, refresh, focals)
    wrong = outliers(said, truth, CASES[case], seed)
    sure = torch.stack([said.pair.confidence1, said.pair.confidence2], 1)
    aucs = [outlier_auc(w, wrong) if wrong.any() else torch.nan for w in (found.weights, sure)]
    right = true_pairs(truth, edges)
    after = true_pairs(found.reconstruction(truth.images, truth.names), edges)
    return Row(
        case,
        scene,
        seed,
        rule,
        trajectory(found, truth),
        focal_error(found.focals, truth.focals)[0],
        *relative(said.pair, right),
        *relative(after, right),
        *aucs,
    )


def outliers(said: Predictions, truth: Reconstruction, flaws: Flaws, seed: int) -> Tensor:
    """Which pixels the oracle put elsewhere, [m, 2, h, w]: without outliers it draws the same."""
    clean = Oracle(truth, replace(flaws, outliers=0.0), seed).predictions(said.edges)
    one = said.pair.points1 != clean.pair.points1
    two = said.pair.points2 != clean.pair.points2
    return torch.stack([one.any(-1), two.any(-1)], 1)


def trajectory(found: Alignment, truth: Reconstruction) -> float:
    """The ATE as a share of the scene's radius."""
    points = truth.points()[truth.shown()]
    return ate(found.poses, truth.poses).rmse / float((points - points.mean(0)).norm(dim=-1).mean())


def relative(said: Pair, right: Pair) -> tuple[float, float]:
    """Mean relative errors of pairs' own views and other views."""
    off = point_error(said, right)
    return float((off.own / off.size).mean()), float((off.other / off.size).mean())


# The tables


def told(values: Iterable[float]) -> str:
    """The median, and the smallest and largest in brackets; a dash for nothing but NaN."""
    known = [value for value in values if value == value]
    if not known:
        return "-"
    return f"{statistics.median(known):.2g} ({min(known):.2g} to {max(known):.2g})"


def tables(rows: Sequence[Row]) -> str:
    """A table by case and rule, over all scenes and seeds, then what the contract asks."""
    lines = [
        "| flaw | weights | ATE / radius | focal, % | own view | other view | AUC of w | of C |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in dict.fromkeys(r.case for r in rows):
        for rule in RULES:
            mine = [r for r in rows if (r.case, r.rule) == (case, rule)]
            own = f"{told(r.own_before for r in mine)} -> {told(r.own for r in mine)}"
            other = f"{told(r.other_before for r in mine)} -> {told(r.other for r in mine)}"
            cells = [told(r.ate for r in mine), told(r.focal for r in mine), own, other]
            aucs = [told(r.weight_auc for r in mine), told(r.confidence_auc for r in mine)]
            lines.append(f"| {' | '.join([case, rule, *cells, *aucs])} |")
    return "\n".join([*lines, "", by_scene(rows), "", verdicts(rows)])


def by_scene(rows: Sequence[Row]) -> str:
    """ATE over the radius by kind of scene: median over the seeds and spread."""
    kinds = list(dict.fromkeys(r.scene for r in rows))
    lines = [f"| ATE / radius | weights | {' | '.join(kinds)} |", "| --- " * (len(kinds) + 2) + "|"]
    for case in dict.fromkeys(r.case for r in rows):
        for rule in RULES:
            mine = [r for r in rows if (r.case, r.rule) == (case, rule)]
            cells = [told(r.ate for r in mine if r.scene == kind) for kind in kinds]
            lines.append(f"| {' | '.join([case, rule, *cells])} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Asked:
    """A number of the contract: of which case, how it is found, and what it has to reach."""

    case: str
    what: str
    value: Callable[[Row, Row], float]  # of the robust row and the fixed one
    least: float | None = None
    most: float | None = None

    def judged(self, values: Sequence[float]) -> str:
        """The worst of the values and whether it holds."""
        worst = min(values) if self.least is not None else max(values)
        held = worst >= self.least if self.least is not None else worst <= (self.most or 0.0)
        return f"{worst:.3g} {'yes' if held else '**no**'}"


def _ratio(robust: Row, fixed: Row) -> float:
    return fixed.ate / max(robust.ate, torch.finfo(torch.float32).eps)


ASKED = (
    Asked(EXACT, "ATE / radius, most 0.001", lambda robust, _: robust.ate, most=1e-3),
    Asked(ONE, "ATE / radius, most 0.001", lambda robust, _: robust.ate, most=1e-3),
    Asked(ONE, "fixed ATE over robust, least 5", _ratio, least=5),
    Asked(FAR, "ATE / radius, most 0.001", lambda robust, _: robust.ate, most=1e-3),
    Asked(FAR, "fixed ATE over robust, least 5", _ratio, least=5),
    Asked(ALL, "fixed ATE over robust, least 5", _ratio, least=5),
    *(
        asked
        for case in (ONE, FAR, ALL, TOLD)
        for asked in (
            Asked(case, "AUC of w, least 0.95", lambda robust, _: robust.weight_auc, least=0.95),
            Asked(case, "AUC of w less that of C, least 0", lambda r, _: _surplus(r), least=0),
        )
    ),
    *(
        asked
        for case in (NOISE, KNOWN)
        for asked in (
            Asked(case, "own view, most 0.03", lambda robust, _: robust.own, most=0.03),
            Asked(case, "other view, most 0.06", lambda robust, _: robust.other, most=0.06),
        )
    ),
)


def _surplus(row: Row) -> float:
    return row.weight_auc - row.confidence_auc


def verdicts(rows: Sequence[Row]) -> str:
    """For each number that was asked for, its worst over the seeds by kind of scene."""
    kinds = list(dict.fromkeys(r.scene for r in rows))
    by = {(r.case, r.scene, r.seed, r.rule): r for r in rows}
    seeds = list(dict.fromkeys(r.seed for r in rows))
    lines = [
        f"| flaw | asked of robust, worst seed | {' | '.join(kinds)} |",
        "| --- " * (len(kinds) + 2) + "|",
    ]
    for asked in (a for a in ASKED if any(r.case == a.case for r in rows)):
        cells = []
        for kind in kinds:
            pairs = [
                [by.get((asked.case, kind, s, rule)) for rule in ("robust", "fixed")] for s in seeds
            ]
            values = [asked.value(one, other) for one, other in pairs if one and other]
            cells.append(asked.judged(values) if values else "-")
        lines.append(f"| {' | '.join([asked.case, asked.what, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--views", type=int, default=6)
    parser.add_argument("--width", type=int, default=32, help="of the images; 3/4 of it high")
    parser.add_argument("--sweeps", type=int, default=STEPS)
    parser.add_argument("--refresh", type=int, default=REFRESH, help="of the weights, in sweeps")
    parser.add_argument("--only", default="", help="the flaws with this in their name")
    asked = parser.parse_args()
    one_thread()
    began, rows = time.process_time(), []
    for seed in map(int, asked.seeds.split(",")):
        for kind, draw in SCENES.items():
            truth = draw(seed, asked.views, (asked.width * 3 // 4, asked.width))
            for case, rule in product((c for c in CASES if asked.only in c), RULES):
                rows.append(row(case, kind, seed, rule, truth, asked.sweeps, asked.refresh))
    print(
        f"{machine()}\n\n{asked.views} views of {asked.width}x{asked.width * 3 // 4} pixels,"
        f" {asked.sweeps} sweeps, weights refreshed every {asked.refresh},"
        f" seeds {asked.seeds}; over {', '.join(SCENES)} and seeds the"
        f" median (least to most). {(time.process_time() - began) / 60:.1f} CPU minutes.\n"
    )
    print(tables(rows))


if __name__ == "__main__":
    main()
