"""What a run leaves in its folder besides `RunFiles`' files, and what keeps it from being lost."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..core.container import write_atomically
from ..core.errors import AdaptError
from .pictures import confusion_matrix
from .task import ImageClassification

CONFIG, ADAPTER, LAST = "config.yaml", "adapter.safetensors", "last.ckpt"
TEST_TABLE, TEST_PICTURE = "test_metrics.csv", "confusion_matrix.png"
OF_A_RUN = (ADAPTER, LAST, "best.ckpt", "metrics.csv", "learning_curve.png")


class StartOfRun(Callback):
    """Writes the configuration, but only once the data has been read and found good.

    A new run (`fresh`) also clears away what an older one left in the folder.
    """

    def __init__(self, folder: Path, effective: Callable[[], str], fresh: bool) -> None:
        self.folder = folder
        self.effective = effective
        self.fresh = fresh

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainer.is_global_zero:
            return
        make_folder(self.folder)
        if self.fresh:
            for name in (*OF_A_RUN, TEST_TABLE, TEST_PICTURE):
                (self.folder / name).unlink(missing_ok=True)
        write_atomically(self.folder / CONFIG, self.effective().encode())
        print(f"configuration: {self.folder / CONFIG}", flush=True)


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
        make_folder(self.folder)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        rows = f"{','.join(metrics)}\n{','.join(map(str, metrics.values()))}\n"
        write_atomically(self.folder / TEST_TABLE, rows.encode())
        title = f"{type(pl_module.adapters.recipe).__name__}: {metrics['test_top1']:.1%} right"
        picture = confusion_matrix(self.counts, pl_module.classes, title)
        write_atomically(self.folder / TEST_PICTURE, picture)
        print(f"{self.folder / TEST_TABLE}\n{self.folder / TEST_PICTURE}", flush=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdaptError(f"cannot make the folder {folder}: {error.strerror}") from error


def refuse_to_replace(folder: Path, checkpoint: str | None) -> None:
    """A folder that holds another run is left alone; going on with its own run is fine."""
    if checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve():
        return
    if (folder / ADAPTER).exists() or (folder / LAST).exists():
        raise AdaptError(
            f"{folder} holds a run: --run FOLDER writes elsewhere, --overwrite true replaces it,"
            f" --resume {shlex.quote(str(folder))} goes on with it"
        )


def say_how_to_go_on(folder: Path) -> None:
    """After an interrupt."""
    if (folder / LAST).is_file():
        again = f"polyadapt vision fit --resume {shlex.quote(str(folder))}"
        print(f"polyadapt: stopped; to go on: {again}", file=sys.stderr)
    else:
        print("polyadapt: stopped before the first epoch ended; start again", file=sys.stderr)


def say_what_to_do_next(folder: Path) -> None:
    """After a whole run: its files, and what can be done with them."""
    for name in (CONFIG, *OF_A_RUN):
        if (folder / name).is_file():
            print(folder / name)
    adapter, config = (shlex.quote(str(folder / name)) for name in (ADAPTER, CONFIG))
    print(f"next: polyadapt vision test --config {config} --set {adapter}")
    print(f"      polyadapt vision predict --set {adapter} IMAGE ...", flush=True)
