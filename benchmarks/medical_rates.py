"""Learning rates of `medical_chase`: a small grid for each method, chosen by validation Dice alone.

All rates are tried with one seed, the two best again with another, and the higher mean is taken.
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
SEEDS = 100, 101  # of none of the reported runs


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training at one rate: mean loss of its last tenth, and the validation pictures' Dice."""

    method: str
    rate: float
    seed: int
    last_loss: float
    val_dice: float


def grid(method: str) -> Sequence[float]:
    return FULL_GRID if method == "full" else GRID


def tried(method: str, setting: Setting, data: SegmentationData, out: Path) -> list[Trial]:
    """The trials of a method; those that are found in the folder are taken as they are."""
    out.mkdir(parents=True, exist_ok=True)
    all_rates = [_kept(method, rate, SEEDS[0], setting, data, out) for rate in grid(method)]
    hopeful = sorted(all_rates, key=lambda trial: -trial.val_dice)[:2]
    return all_rates + [_kept(method, t.rate, SEEDS[1], setting, data, out) for t in hopeful]


def _kept(
    method: str, rate: float, seed: int, setting: Setting, data: SegmentationData, out: Path
) -> Trial:
    file = out / f"{method.replace(' ', '-')}-{rate:g}-seed{seed}.json"
    if not file.exists():
        made = asdict(_trial(method, rate, seed, setting, data))
        write_atomically(file, json.dumps(made, indent=1).encode())
        print(f"{method} at {rate:g}: {made['val_dice']:.3f}", flush=True)
    return Trial(**json.loads(file.read_text()))


def _trial(method: str, rate: float, seed: int, setting: Setting, data: SegmentationData) -> Trial:
    task, losses, _ = fitted(sam_task(method, setting, seed, rate), setting.epochs, data)
    return Trial(
        method=method,
        rate=rate,
        seed=seed,
        last_loss=float(np.mean(losses[-max(1, len(losses) // 10) :])),
        val_dice=mean_dice(measured(of(task), data.cases("val"), overlap_only=True)),
    )


def best(trials: Sequence[Trial]) -> float:
    """The rate with the highest mean Dice of those with most seeds; of equal ones the lowest."""
    by_rate = _by_rate(trials)
    most = max(len(found) for found in by_rate.values())
    means = {
        rate: float(np.mean([trial.val_dice for trial in found]))
        for rate, found in by_rate.items()
        if len(found) == most
    }
    return max(means, key=lambda rate: (means[rate], -rate))


def _by_rate(trials: Sequence[Trial]) -> dict[float, list[Trial]]:
    rates = sorted({trial.rate for trial in trials})
    return {rate: [trial for trial in trials if trial.rate == rate] for rate in rates}


def rates_table(trials: Mapping[str, Sequence[Trial]]) -> str:
    """A row per method, a column per rate: validation Dice (last loss) by seed, the best marked."""
    rates = sorted({trial.rate for of_method in trials.values() for trial in of_method})
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    lines.append("| --- " * (len(rates) + 1) + "|")
    for method, of_method in trials.items():
        known, chosen = _by_rate(of_method), best(of_method)
        cells = [_cell(known.get(rate, []), rate == chosen) for rate in rates]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(trials: Sequence[Trial], chosen: bool) -> str:
    text = ", ".join(f"{trial.val_dice:.3f} ({trial.last_loss:.2f})" for trial in trials) or "-"
    return f"**{text}**" if chosen else text
