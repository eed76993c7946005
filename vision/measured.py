"""What a test of an image classifier leaves in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..core.container import write_atomically
from ..core.errors import AdaptError
from ..core.run_folder import write_test_table
from .pictures import confusion_matrix
from .task import ImageClassification

TEST_TABLE, TEST_PICTURE = "test_metrics.csv", "confusion_matrix.png"


class Measured(Callback):
    """Writes the metrics of the test part and what its images were taken for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ImageClassification)
        if trainer.world_size > 1:  # each process would see, and count, its own images
            raise AdaptError(f"test with --trainer.devices 1, not with {trainer.world_size}")
        classes = len(pl_module.classes)
        self.counts = torch.zeros(classes, classes, dtype=torch.long)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        labels: Tensor = batch[1].cpu()
        self.counts.index_put_((labels, outputs.cpu()), torch.ones_like(labels), accumulate=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ImageClassification)
        metrics = write_test_table(self.folder, TEST_TABLE, trainer)
        title = f"{type(pl_module.adapters.recipe).__name__}: {metrics['test_top1']:.1%} right"
        picture = confusion_matrix(self.counts, pl_module.classes, title)
        write_atomically(self.folder / TEST_PICTURE, picture)
        print(f"{self.folder / TEST_TABLE}\n{self.folder / TEST_PICTURE}", flush=True)
