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

    figure = Figure(figsize=(3 * len(folders), 3.3))
    axes = figure.subplots(1, len(folders), squeeze=False)
    for axis, folder in zip(axes[0], folders, strict=True):
        record = Record.load(folder / "record.json")
        name = min(record.pictures)
        axis.imshow(imread(folder / f"{name}.png"))
        dice = record.pictures[name]["dice"]
        step = folder.name.split("-")[0]
        axis.set_title(f"{step}: {record.method}, Dice {dice:.2f}", fontsize=8)
        axis.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(file, dpi=90)


# Tables


def by_picture(records: Sequence[Record], name: str) -> Values:
    """A score's means over seeds [pictures], in the order of the names."""
    names = sorted(records[0].pictures)
    found: Values = np.array([[r.pictures[n][name] for n in names] for r in records])
    means: Values = found.mean(0)
    return means


def interval(values: Values, draws: int = 10_000) -> str:
    """The mean over pictures, and where 95 % of the means of redrawn pictures lie.

    >>> interval(np.array([0.5, 0.5, 0.5]))
    '0.500 (0.500 to 0.500)'
    """
    chosen = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[chosen].mean(1), [2.5, 97.5])
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def table(records: Sequence[Record]) -> str:
    """One row per method, in the order of their first record; seeds are averaged per picture."""
    head = ("method", "adapters", "trained", "stored bytes", "seeds", "CPU s", "loss", "Dice")
    lines = [" | ".join(("", *head, "clDice", "HD95", "")).strip(), "| --- " * 10 + "|"]
    for method in dict.fromkeys(r.method for r in records):
        of = [r for r in records if r.method == method]
        first, seconds = of[0], statistics.mean(r.cpu_seconds for r in of)
        falls = statistics.mean(r.first_loss for r in of), statistics.mean(r.last_loss for r in of)
        cells = [method, f"{first.adapters:,}", f"{first.trained:,}", f"{first.stored:,}"]
        cells += [str(len(of)), f"{seconds:.0f}", f"{falls[0]:.2f} to {falls[1]:.2f}"]
        cells += [interval(by_picture(of, name)) for name in SCORES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against(records: Sequence[Record], one: str, other: str) -> str:
    """The difference of two methods, picture by picture, with its interval."""
    pair = [[r for r in records if r.method == method] for method in (one, other)]
    if not all(pair):
        return f"{one} against {other}: not both were run"
    parts = [
        f"{name} {interval(by_picture(pair[0], name) - by_picture(pair[1], name))}"
        for name in SCORES
    ]
    return f"{one} less {other}: {', '.join(parts)}"
