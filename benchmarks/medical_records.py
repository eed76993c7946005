"""What a run of `medical_chase` leaves behind, and how its scores become a table with intervals."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from polyadapt.core.container import write_atomically
from polyadapt.vision.medical.data import Case
from polyadapt.vision.medical.metrics import score
from polyadapt.vision.medical.overlay import overlay

Values = NDArray[np.float64]
Segment = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
Pictures = Mapping[str, Mapping[str, float]]
SCORES = ("dice", "cldice", "hd95")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One training and its scores on the test pictures, by name, at their own size."""

    method: str
    seed: int
    rate: float
    adapters: int
    trained: int
    stored: int
    steps: int
    cpu_seconds: float
    first_loss: float
    last_loss: float
    val_dice: float
    pictures: Pictures

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self), indent=1).encode())

    @staticmethod
    def load(path: Path) -> Record:
        return Record(**json.loads(path.read_text()))


def measured(
    segment: Segment, cases: Sequence[Case], folder: Path | None = None, overlap_only: bool = False
) -> Pictures:
    """Dice, clDice and HD95 of masks at the pictures' own size; overlays go into the folder.

    With `overlap_only` Dice alone, which is quick.
    """
    found = {}
    for case in cases:
        picture, target = case.read()
        mask = segment(picture.pixels)
        scores = score(mask, target, overlap_only=overlap_only)
        found[case.name] = {name: getattr(scores, name) for name in (*SCORES, "empty")}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{case.name}.png").write_bytes(overlay(picture.pixels, mask, target))
    return found


def mean_dice(pictures: Pictures) -> float:
    return statistics.mean(scores["dice"] for scores in pictures.values())


def shown(folders: Sequence[Path], file: Path) -> None:
    """A figure of the runs' overlays of the first test picture, each under its run and Dice."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    columns = min(4, len(folders))
    rows = -(-len(folders) // columns)
    figure = Figure(figsize=(3 * columns, 3.3 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, folder in zip(axes, folders, strict=False):
        record = Record.load(folder / "record.json")
        name = min(record.pictures)
        axis.imshow(imread(folder / f"{name}.png"))
        dice = record.pictures[name]["dice"]
        step = folder.name.split("-")[0]
        axis.set_title(f"{step}: {record.method}, Dice {dice:.2f}", fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(file, dpi=90)


# Tables


def by_seed(records: Sequence[Record], name: str) -> Values:
    """A score [seeds, pictures]: a row per record, pictures in the order of their names."""
    names = sorted(records[0].pictures)
    return np.array([[r.pictures[n][name] for n in names] for r in records])


def interval(values: Values, draws: int = 10_000) -> str:
    """The mean of [seeds, pictures], and where 95 % of the means lie when both are redrawn.

    Pictures alone, where there is one seed. Of three seeds redrawing tells little.

    >>> interval(np.array([[0.5, 0.5, 0.5]]))
    '0.500 (0.500 to 0.500)'
    """
    draw = np.random.default_rng(0)
    rows, columns = (draw.integers(n, size=(draws, n)) for n in values.shape)
    means = values[rows[:, :, None], columns[:, None, :]].mean((1, 2))
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def table(records: Sequence[Record]) -> str:
    """One row per method, in the order of their first record."""
    head = ("method", "rate", "adapters", "trained", "stored bytes", "seeds", "CPU s", "loss")
    lines = [" | ".join(("", *head, "Dice", "clDice", "HD95", "")).strip(), "| --- " * 11 + "|"]
    for method in dict.fromkeys(r.method for r in records):
        of = [r for r in records if r.method == method]
        first, seconds = of[0], statistics.mean(r.cpu_seconds for r in of)
        falls = statistics.mean(r.first_loss for r in of), statistics.mean(r.last_loss for r in of)
        cells = [method, f"{first.rate:g}", f"{first.adapters:,}", f"{first.trained:,}"]
        cells += [f"{first.stored:,}", str(len(of)), f"{seconds:.0f}"]
        cells += [f"{falls[0]:.2f} to {falls[1]:.2f}"]
        cells += [interval(by_seed(of, name)) for name in SCORES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against(records: Sequence[Record], one: str, other: str) -> str:
    """The difference of two methods by seed and picture, of the seeds that both have."""
    pair = [{r.seed: r for r in records if r.method == method} for method in (one, other)]
    seeds = sorted(pair[0].keys() & pair[1].keys())
    if not seeds:
        return f"{one} against {other}: not both were run"
    first, second = ([found[seed] for seed in seeds] for found in pair)
    parts = [f"{name} {interval(by_seed(first, name) - by_seed(second, name))}" for name in SCORES]
    return f"{one} less {other}: {', '.join(parts)}"
