"""Self-calibration of the small network on held-out scenes: the gates and the goal, by scene.

Scenes that never train (heightfields and boxes by turns, `--views` each, 64x48 pixels), as the
network knows them, from cameras in an orbit, and by night. For each: what the network says, the
aligned scene, and the network after a set was trained on its own labels (self), on the truth, on an
oracle's answers with independent noise of 0.1 (oracle) and on other pairs' truth (shuffled).
Errors are the mean of |X / z - X~ / z~| against the truth on pairs with a held-out view; every
method trains on the same other views. ATE is a share of the scene's radius.

Run: python benchmarks/geometry_calibration.py [--weights FILE] [--scenes 8] [--views 10]
  [--shifts none,orbit,night] [--methods self,truth,oracle,shuffled] [--epochs 10]
  [--out geometry_calibration]
Without --weights, the packaged ones. Each result is kept in the folder --out: a run that was
interrupted goes on where it stopped. The tables are printed at the end, of what there is so far
with --only-tables.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyadapt.benchmarks.geometry_alignment import relative, trajectory
from polyadapt.benchmarks.geometry_gates import report
from polyadapt.benchmarks.rounds import machine, one_thread
from polyadapt.core.container import write_atomically
from polyadapt.core.errors import AdaptError
from polyadapt.core.recipe import Recipe
from polyadapt.geometry3d.alignment import Alignment, align
from polyadapt.geometry3d.backbones import SmallPointmaps
from polyadapt.geometry3d.calibration import (
    RECIPE,
    Calibration,
    Schedule,
    Survey,
    calibrate,
    error_of,
    held_out_views,
    shuffled,
    survey,
)
from polyadapt.geometry3d.diagnosis import diagnose_with
from polyadapt.geometry3d.labels import Labels, pseudo_labels, true_labels
from polyadapt.geometry3d.loss import distances
from polyadapt.geometry3d.oracle import Flaws, Oracle
from polyadapt.geometry3d.pointmaps import Pair, PointmapNetwork
from polyadapt.geometry3d.predictions import Predictions, predict
from polyadapt.geometry3d.reconstruction import Reconstruction
from polyadapt.geometry3d.scenes.camouflage import NIGHT, NONE, ORBIT, camouflaged
from polyadapt.geometry3d.small import WEIGHTS, small_network
from polyadapt.geometry3d.view_scores import true_pairs
from polyadapt.geometry3d.weights import Calibrated, Fixed

SHIFTS = {"none": NONE, "orbit": ORBIT, "night": NIGHT}
METHODS = ("self", "truth", "oracle", "shuffled")
CONTROLS = ("oracle", "shuffled")
FIRST = 2 * 10**9  # of the scenes' seeds: those that train and those that measure lie far below
BATCH = 6  # pairs that are asked about at a time
NOISE = 0.1
RULE = Calibrated(gate=SmallPointmaps.gate)  # as the commands take for this network

Record = dict[str, Any]


class Records:
    """What was measured, as lines of JSON in a folder that belongs to one choice of settings."""

    def __init__(self, folder: Path, settings: Record) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, kept = folder / "records.jsonl", folder / "settings.json"
        if not kept.exists():
            write_atomically(kept, json.dumps(settings).encode())
        if (found := json.loads(kept.read_text())) != settings:
            raise SystemExit(f"{folder} was made with {found}, not {settings}: choose another")
        lines = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        if lines and not lines[-1].endswith("\n"):  # the last run ended within a line
            lines.pop()
            write_atomically(self.file, "".join(lines).encode())
        self.all: list[Record] = [json.loads(line) for line in lines]

    def has(self, shift: str, scene: int, what: str) -> bool:
        """Whether this was measured."""
        return any((r["shift"], r["scene"], r["what"]) == (shift, scene, what) for r in self.all)

    def add(self, shift: str, scene: int, what: str, found: Record) -> None:
        """Keep a result."""
        record = {"shift": shift, "scene": scene, "what": what, **found}
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.all.append(record)
        spent = time.process_time() / 60
        print(f"{shift}, scene {scene}: {what} ({spent:.1f} CPU min so far)", flush=True)


@dataclass(eq=False)
class Known:
    """A scene with its truth, and what a network says of it."""

    truth: Reconstruction
    network: PointmapNetwork
    seen: Survey
    tests: Tensor = field(init=False)  # the numbers of the pairs that hold a held-out view
    right: Labels = field(init=False)

    def __post_init__(self) -> None:
        edges = self.seen.predictions.edges
        apart = edges.new_tensor(held_out_views(len(self.truth)))
        self.tests = (edges[:, :, None] == apart).any((1, 2)).nonzero()[:, 0]
        self.right = true_labels(self.truth, edges)

    def error(self, pair: Pair) -> float:
        """Against the truth, on held-out pairs, of answers to all pairs."""
        some = Pair(*(part[self.tests] for part in pair))
        return error_of(some, self.right.chosen(self.tests))

    def pairs_of(self, found: Alignment) -> Pair:
        """What an aligned scene says of all pairs."""
        scene = found.reconstruction(self.truth.images, self.truth.names)
        return true_pairs(scene, self.seen.predictions.edges)


def surveyed(network: PointmapNetwork, truth: Reconstruction) -> Known:
    """Ask, align and diagnose; focals are known, as the small network's have to be."""
    seen = survey(network, truth.images, rule=RULE, focals=truth.focals)
    return Known(truth, network, seen)


def base(known: Known) -> Record:
    """Errors of the network alone and of its aligned answers; spread and bias."""
    predictions, robust = known.seen.predictions, known.seen.alignment
    fixed = align(predictions, Fixed(), focals=known.truth.focals)
    right = true_pairs(known.truth, predictions.edges)
    own, other = relative(predictions.pair, right)
    own_robust, other_robust = relative(known.pairs_of(robust), right)
    against = diagnose_with(predictions, known.truth)
    return {
        "error": known.error(predictions.pair),
        "error fixed": known.error(known.pairs_of(fixed)),
        "error robust": known.error(known.pairs_of(robust)),
        "own": own,
        "other": other,
        "own robust": own_robust,
        "other robust": other_robust,
        "ate fixed": trajectory(fixed, known.truth),
        "ate robust": trajectory(robust, known.truth),
        "spread": against.spread,
        "bias": against.bias,
        "predicted": against.predicted_gain,
        "guessed spread": known.seen.diagnosis.spread,
        "guessed bias": known.seen.diagnosis.bias,
        "guessed": known.seen.diagnosis.predicted_gain,
    }


def partners(network: PointmapNetwork, truth: Reconstruction, other: Reconstruction) -> Record:
    """The error of the first pointmap's shape with three second images, over all pairs."""
    edges = torch.cartesian_prod(*[torch.arange(len(truth))] * 2)
    edges = edges[edges[:, 0] != edges[:, 1]]
    labels = true_labels(truth, edges)
    found = {}
    for name, images, second in (
        ("right", truth.images, edges[:, 1]),
        ("same", truth.images, edges[:, 0]),
        ("shuffled", other.images, edges[:, 1]),
    ):
        both = torch.cat([truth.images, images])
        asked = torch.stack([edges[:, 0], second + len(truth)], 1)
        found[name] = _own(predict(network, both, asked, BATCH).pair, labels)
    return found


def _own(pair: Pair, labels: Labels) -> float:
    """Of the first view alone, in units of its own mean distance."""
    nothing = torch.zeros_like(labels.valid2)
    one = distances(pair, labels._replace(valid2=nothing))[0]
    return float(one.sum() / labels.valid1.sum())


def labels_for(method: str, known: Known, seed: int) -> tuple[Labels, Labels]:
    """(what trains, what judges whether the set is kept); self has nothing but its own."""
    if method == "self":
        own = pseudo_labels(known.seen.alignment)
        return own, own
    if method == "truth":
        return known.right, known.right
    if method == "shuffled":
        return shuffled(known.right, seed), known.right
    said = Oracle(known.truth, Flaws(noise=NOISE), seed).predictions(known.seen.predictions.edges)
    pair = said.pair
    given = pair.points1.isfinite().all(-1), pair.points2.isfinite().all(-1)
    return Labels(pair.points1, given[0], pair.points2, given[1]), known.right


class _AtTheEnd:
    """Told of a calibration's progress: scores the network before it is known if it is kept."""

    def __init__(self, known: Known, scored: bool) -> None:
        self.known, self.scored, self.found = known, scored, Record()

    def __call__(self, what: str, done: int, of: int) -> None:
        if what != "steps of calibration" or done < of:
            return
        known = self.known
        edges, images = known.seen.predictions.edges, known.truth.images
        said: Predictions = predict(known.network, images, edges, BATCH)
        self.found = {"after": known.error(said.pair)}
        if self.scored:
            found = align(said, RULE, focals=known.truth.focals)
            self.found["ate"] = trajectory(found, known.truth)


def calibrated(
    method: str,
    known: Known,
    at: Sequence[str],
    schedule: Schedule,
    recipe: Recipe = RECIPE,
    seed: int = 0,
) -> Record:
    """Train a set and score it, kept or not; the network ends as it was."""
    before = {"before": known.error(known.seen.predictions.pair)}
    end = _AtTheEnd(known, scored=method in ("self", "truth"))
    try:
        labels, judge = labels_for(method, known, seed)
        found: Calibration = calibrate(
            known.network,
            known.seen,
            at,
            schedule=schedule,
            recipe=recipe,
            labels=labels,
            judge=judge,
            seed=seed,
            tell=end,
        )
    except AdaptError as error:  # where the network is too unsure there are no labels
        if method != "self":
            raise
        return before | {"refused": str(error), "kept": False}
    if found.adapters is not None:
        found.adapters.detach()
    judged = {"kept": found.adapters is not None, "judged gain": found.gain}
    return before | end.found | judged | {"labelled": labels.share()}


def run(network: PointmapNetwork, records: Records, asked: argparse.Namespace) -> None:
    """Measure what is not there yet, scene by scene."""
    schedule = Schedule(epochs=asked.epochs)
    for number in range(asked.scenes):
        for name in asked.shifts.split(","):
            wanted = ["base", *asked.methods.split(",")]
            if name == "none":  # gate 3 is about the shifts, gate 1 about the network
                wanted = [*(what for what in wanted if what not in CONTROLS), "partners"]
            if all(records.has(name, number, what) for what in wanted):
                continue
            shift = SHIFTS[name]
            truth = camouflaged(FIRST + number, asked.views, shift=shift)
            known = surveyed(network, truth)
            for what in wanted:
                if records.has(name, number, what):
                    continue
                if what == "base":
                    found = base(known)
                elif what == "partners":  # the other scene is of the same kind
                    other = camouflaged(FIRST + 10**6 + number, asked.views, shift=shift)
                    found = partners(network, truth, other)
                else:
                    at = SmallPointmaps.default_sites
                    found = calibrated(what, known, at, schedule, seed=number)
                records.add(name, number, what, found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--shifts", default=",".join(SHIFTS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--epochs", type=int, default=Schedule.epochs)
    parser.add_argument("--out", type=Path, default=Path("geometry_calibration"))
    parser.add_argument("--only-tables", action="store_true")
    asked = parser.parse_args()
    one_thread()
    mark = hashlib.sha256(asked.weights.read_bytes()).hexdigest()[:12]
    settings = {"weights": mark, "views": asked.views, "epochs": asked.epochs}
    records = Records(asked.out, settings)
    if not asked.only_tables:
        run(small_network(file=str(asked.weights)).eval(), records, asked)
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    print(f"{machine()}\n\n{told}\n")
    print(report(records.all))


if __name__ == "__main__":
    main()
