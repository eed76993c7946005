"""How a classifier of images is measured, and what a test of it leaves in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
)

from ..container import write_atomically
from ..errors import AdaptError
from ..run_folder import write_test_table
from ..sets import AdapterSet
from .pictures import confusion_matrix

TEST_TABLE, TEST_PICTURE = "test_metrics.csv", "confusion_matrix.png"


def class_metrics(part: str, classes: int) -> MetricCollection:
    """Top-1 accuracy, macro F1 and calibration error (15 bins) of "val" or "test", from 0 to 1.

    >>> chances, labels = torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1])
    >>> float(class_metrics("val", 2)(chances, labels)["val_top1"])
    0.5
    """
    return MetricCollection(
        {
            "top1": MulticlassAccuracy(classes, average="micro"),
            "macro_f1": MulticlassF1Score(classes, average="macro"),
            "calibration_error": MulticlassCalibrationError(classes, n_bins=15),
        },
        prefix=f"{part}_",
    )


@runtime_checkable
class Classifies(Protocol):
    """A task whose test step returns the predicted classes of a batch (images, labels, ...)."""

    classes: tuple[str, ...]

    @property
    def adapters(self) -> AdapterSet:
        """The set that is tested."""
        ...


class Measured(Callback):
    """Writes the metrics of the test part and what its images were taken for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifies)
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
        assert isinstance(pl_module, Classifies)
        metrics = write_test_table(self.folder, TEST_TABLE, trainer)
        title = f"{type(pl_module.adapters.recipe).__name__}: {metrics['test_top1']:.1%} right"
        picture = confusion_matrix(self.counts, pl_module.classes, title)
        write_atomically(self.folder / TEST_PICTURE, picture)
        print(f"{self.folder / TEST_TABLE}\n{self.folder / TEST_PICTURE}", flush=True)
