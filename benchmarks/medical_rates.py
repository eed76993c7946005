"""Learning rates of `medical_chase`: a small grid for each method, chosen by validation Dice alone.

The test pictures are not looked at. The two validation photographs are of one patient, so a choice
between neighbours says little; it keeps a method from a rate that plainly does not suit it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from polyadapt.benchmarks.medical_methods import Setting, fitted, of, sam_task
from polyadapt.benchmarks.medical_records import mean_dice, measured
from polyadapt.core.container import write_atomically
from polyadapt.vision.medical.data import SegmentationData

GRID = (1e-4, 3e-4, 1e-3, 3e-3)
FULL_GRID = (3e-5, 1e-4, 3e-4)
SEED = 100  # of none of the reported runs


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training at one rate: mean loss of its last tenth, and the validation pictures' Dice."""

    method: str
    rate: float
    last_loss: float
    val_dice: float


def grid(method: str) -> Sequence[float]:
    return FULL_GRID if method == "full" else GRID


def tried(method: str, setting: Setting, data: SegmentationData, out: Path) -> list[Trial]:
    """A trial per rate of the grid; those that are found in the folder are taken as they are."""
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for rate in grid(method):
        file = out / f"{method.replace(' ', '-')}-{rate:g}.json"
        if not file.exists():
            made = asdict(_trial(method, rate, setting, data))
            write_atomically(file, json.dumps(made, indent=1).encode())
        found.append(Trial(**json.loads(file.read_text())))
        print(f"{method} at {rate:g}: {found[-1].val_dice:.3f}", flush=True)
    return found


def _trial(method: str, rate: float, setting: Setting, data: SegmentationData) -> Trial:
    task, losses, _ = fitted(sam_task(method, setting, SEED, rate), setting.epochs, data)
    return Trial(
        method=method,
        rate=rate,
        last_loss=float(np.mean(losses[-max(1, len(losses) // 10) :])),
        val_dice=mean_dice(measured(of(task), data.cases("val"), overlap_only=True)),
    )


def best(trials: Sequence[Trial]) -> Trial:
    """The one with the highest validation Dice, of equal ones the lowest rate."""
    return max(trials, key=lambda trial: (trial.val_dice, -trial.rate))


def rates_table(trials: Mapping[str, Sequence[Trial]]) -> str:
    """A row per method and a column per rate: validation Dice (last loss); the best is marked."""
    rates = sorted({trial.rate for of_method in trials.values() for trial in of_method})
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    lines.append("| --- " * (len(rates) + 1) + "|")
    for method, of_method in trials.items():
        known, chosen = {trial.rate: trial for trial in of_method}, best(of_method)
        cells = [_cell(known.get(rate), chosen) for rate in rates]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(trial: Trial | None, chosen: Trial) -> str:
    if trial is None:
        return "-"
    text = f"{trial.val_dice:.3f} ({trial.last_loss:.2f})"
    return f"**{text}**" if trial == chosen else text
