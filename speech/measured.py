"""What a test of a speech set leaves in the run's folder."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..core.container import write_atomically
from ..core.errors import AdaptError
from ..core.run_folder import write_test_table
from .data import Batch
from .task import SpeechRecognition
from .words import count

TEST_TABLE, TRANSCRIPTS = "test_metrics.csv", "transcripts.csv"


class Measured(Callback):
    """Writes the metrics of the test part, and what was heard in each clip."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[tuple[Any, ...]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:  # each process would see its own clips
            raise AdaptError(f"test with --trainer.devices 1, not with {trainer.world_size}")
        self.rows = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        assert isinstance(pl_module, SpeechRecognition)
        assert isinstance(batch, Batch)
        rule, language = pl_module.normaliser, pl_module.about.language
        for name, text, said in zip(batch.names, batch.texts, outputs["said"], strict=True):
            found = count(said, text, rule, language)
            self.rows.append((name, text.strip(), said.strip(), found.edits, found.words))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        write_test_table(self.folder, TEST_TABLE, trainer)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("clip", "reference", "heard", "edits", "words"))
        writer.writerows(self.rows)
        write_atomically(self.folder / TRANSCRIPTS, text.getvalue().encode())
        print(f"{self.folder / TEST_TABLE}\n{self.folder / TRANSCRIPTS}", flush=True)
