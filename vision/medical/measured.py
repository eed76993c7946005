"""What a test of a segmentation leaves in the run's folder: a row and a picture per picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ...core.container import write_atomically
from ...core.errors import AdaptError
from ...core.run_folder import make_folder, write_test_table
from .masks import Mask, Picture
from .metrics import MaskScores
from .overlay import overlay

TEST_TABLE, TEST_PICTURES, OVERLAYS = "test_metrics.csv", "test_pictures.csv", "test_overlays"
EVERY_OVERLAY = f"{OVERLAYS}/*.png"


@dataclass(frozen=True)
class Scored:
    """A picture of a part with its true mask, the predicted one at its own size, and its scores."""

    name: str
    patient: str
    picture: Picture
    target: Mask
    prediction: Mask
    scores: MaskScores

    @property
    def unit(self) -> str:
        """Of the distance: mm where the file says how large a pixel is."""
        return "px" if self.picture.spacing is None else "mm"


class Measured(Callback):
    """Writes the means of a test, the scores of each picture, and its mask laid over it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:  # each process would see, and write, its own pictures
            raise AdaptError(f"test with --trainer.devices 1, not with {trainer.world_size}")
        self.rows: list[Scored] = []
        make_folder(self.folder / OVERLAYS)
        for old in self.folder.glob(EVERY_OVERLAY):
            old.unlink()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        for one in outputs["scored"]:
            shown = overlay(one.picture.pixels, one.prediction, one.target)
            write_atomically(self.folder / OVERLAYS / f"{one.name}.png", shown)
            self.rows.append(one)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        write_test_table(self.folder, TEST_TABLE, trainer)
        write_atomically(self.folder / TEST_PICTURES, table(self.rows).encode())
        for name in (TEST_TABLE, TEST_PICTURES, OVERLAYS):
            print(self.folder / name, flush=True)


def table(found: Iterable[Scored]) -> str:
    """CSV, a row per picture: `unit` is that of `hd95`, `empty` how many of its two masks are."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["name", "patient", "dice", "iou", "cldice", "hd95", "unit", "empty"])
    for one in found:
        s = one.scores
        numbers = [f"{value:.6g}" for value in (s.dice, s.iou, s.cldice, s.hd95)]
        rows.writerow([one.name, one.patient, *numbers, one.unit, s.empty])
    return text.getvalue()
