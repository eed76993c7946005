"""RunFiles: what a training run leaves in its folder, kept whole and resumable at every moment."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.optim import Optimizer

from .container import write_atomically
from .errors import AdaptError
from .training import AdaptedModule

Row = dict[str, float]
_OURS = "polyadapt run"  # our entry in Lightning's checkpoints


class RunFiles(Checkpoint):
    """Writes a run's files to `folder`, each whole or not at all.

    ======================  ================================================================
    `metrics.csv`           a row per epoch: epoch (from 1), step (optimiser steps so far), lr
                            (of the last step), train_loss (mean over the batches, penalties
                            included), and whatever the module logged
    `last.ckpt`             the state after the last whole epoch: `fit(ckpt_path=...)` resumes it
    `best.ckpt`             the state after the epoch with the best `monitor`, when one is named
    `adapter.safetensors`   at the end: the set and the head, of the best epoch if monitored
    `learning_curve.png`    at the end: the metrics as a picture
    ======================  ================================================================

    The rows travel in the checkpoints, so that a resumed run writes the same file (Lightning's
    CSVLogger begins anew). List it after other checkpoint callbacks, whose state it saves.
    Raises `AdaptError` for a folder that cannot be made and a `monitor` that is not logged: one
    that begins with `val_` before the first epoch, if Lightning then tries the validation.

    >>> import tempfile
    >>> files = RunFiles(tempfile.mkdtemp(), monitor="val_top1")
    >>> files.path("metrics.csv").name
    'metrics.csv'
    """

    def __init__(self, folder: str | Path, monitor: str | None = None, mode: str = "max") -> None:
        super().__init__()
        if mode not in ("max", "min"):
            raise AdaptError(f"RunFiles: mode={mode!r} is not allowed: 'max' or 'min'")
        self.folder = Path(folder)
        self.monitor = monitor
        self.mode = mode
        self.rows: list[Row] = []
        self.best: float | None = None
        self._loss_sum = 0.0
        self._batches = 0
        self._lr = math.nan
        self._known: set[str] = set()
        self._validation_names: set[str] = set()
        self._validated = False
        self._improved = False

    def path(self, name: str) -> Path:
        """A file of this run."""
        return self.folder / name

    @property
    def best_model_path(self) -> str:
        """What Lightning's `ckpt_path="best"` means: the best epoch if monitored, else the last."""
        return str(self.path("best.ckpt" if self.monitor else "last.ckpt"))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, AdaptedModule):
            raise AdaptError(f"RunFiles needs an AdaptedModule, not {type(pl_module).__name__}")
        if stage == "fit" and not _tries_only(trainer) and trainer.is_global_zero:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise AdaptError(
                    f"cannot make the folder {self.folder}: {error.strerror}"
                ) from error

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._lr = float(optimizer.param_groups[0]["lr"])  # afterwards it is the next step's

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning divides the loss by the number of batches whose gradients are accumulated.
        self._loss_sum += float(outputs["loss"]) * trainer.accumulate_grad_batches
        self._batches += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._known = set(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_names |= set(trainer.callback_metrics) - self._known
        self._validated = not trainer.sanity_checking

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a misspelt `monitor` of the validation before an epoch is spent on it."""
        missing = self.monitor is not None and self.monitor not in self._validation_names
        if missing and str(self.monitor).startswith("val_") and self._validation_names:
            raise AdaptError(
                f"monitor={self.monitor!r} is not logged; logged: {sorted(self._validation_names)}"
                " by the validation before the first epoch"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.best is not None and not self.path("best.ckpt").is_file():
            raise AdaptError(
                f"the resumed run's best epoch is not in {self.folder}: resume in the folder of the"
                " first part, or copy its best.ckpt here"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_epoch(trainer)
        if _tries_only(trainer):
            return
        if trainer.is_global_zero:
            write_atomically(self.path("metrics.csv"), _table(self.rows).encode())
        if self._improved:
            self._improved = False
            _save_checkpoint(trainer, self.path("best.ckpt"))
        if trainer.is_last_batch:  # an epoch that was cut short could not be resumed
            _save_checkpoint(trainer, self.path("last.ckpt"))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        epoch = trainer.fit_loop.epoch_progress.state_dict()["current"]
        if epoch["processed"] == epoch["started"]:  # another callback may save at the end before us
            self._finish_epoch(trainer)
        # Not in `state_dict`: Lightning would ask for this callback wherever the file is used.
        names = sorted(self._validation_names)
        checkpoint[_OURS] = {"rows": self.rows, "best": self.best, "validation_names": names}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        ours = checkpoint.get(_OURS)
        if ours is not None and trainer.state.fn == "fit":
            self.rows = [dict(row) for row in ours["rows"]]
            self.best = ours["best"]
            self._validation_names = set(ours["validation_names"])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _tries_only(trainer) or not self.rows:
            return
        assert isinstance(pl_module, AdaptedModule), "setup has seen to it"
        if self.best is not None:  # in all processes: they go on with the same tensors
            best = torch.load(self.path("best.ckpt"), map_location="cpu", weights_only=True)
            pl_module.load_state_dict(best["state_dict"])
        if not trainer.is_global_zero:
            return
        pl_module.save_adapter(self.path("adapter.safetensors"))
        method = type(pl_module.adapters.recipe).__name__
        picture = learning_curve(self.rows, f"Learning curve: {method}, set {pl_module.set_name!r}")
        write_atomically(self.path("learning_curve.png"), picture)

    def _finish_epoch(self, trainer: Trainer) -> None:
        """Add the row of the epoch that has ended, once."""
        if self._batches:
            row = self._row(trainer)
            self._improved = self._is_better(row, trainer)
            self.rows.append(row)
            self._loss_sum, self._batches, self._validated = 0.0, 0, False

    def _row(self, trainer: Trainer) -> Row:
        loss = torch.tensor(self._loss_sum / self._batches, dtype=torch.float64)
        row: Row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": self._lr,
            "train_loss": float(_mean_over_processes(trainer, loss)),
        }
        stale = set() if self._validated else self._validation_names
        for name, value in trainer.callback_metrics.items():
            if name not in stale:
                row.setdefault(name, float(value))
        # What is best must be one decision: every process takes part in a checkpoint.
        return trainer.strategy.broadcast(row)

    def _is_better(self, row: Row, trainer: Trainer) -> bool:
        """Whether this epoch has the best monitored value so far; then it is noted."""
        if self.monitor is None:
            return False
        if self.monitor not in row:
            if self._validated or not trainer.enable_validation:
                raise AdaptError(f"monitor={self.monitor!r} is not logged; logged: {sorted(row)}")
            return False
        sign = 1 if self.mode == "max" else -1
        better = self.best is None or sign * row[self.monitor] > sign * self.best
        if better:
            self.best = row[self.monitor]
        return better


def _tries_only(trainer: Trainer) -> bool:
    """`fast_dev_run` must not touch the files of a real run."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _save_checkpoint(trainer: Trainer, path: Path) -> None:
    """Lightning writes by way of a folder that may lie on another disk: rename it ourselves."""
    part = path.with_name(f".{path.name}.part")
    trainer.save_checkpoint(part)
    if trainer.is_global_zero:
        os.replace(part, path)
    trainer.strategy.barrier()


def _mean_over_processes(trainer: Trainer, value: Tensor) -> Tensor:
    if trainer.world_size == 1:
        return value
    mean: Tensor = trainer.strategy.reduce(value.to(trainer.strategy.root_device), reduce_op="mean")
    return mean


def _table(rows: Sequence[Row]) -> str:
    """The rows as CSV, a column for every name; values that a row lacks stay empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        # Eight digits tell the float32 values of metrics apart and show 0.1 as 0.1.
        cells = {n: v if isinstance(v, int) else f"{v:.8g}" for n, v in row.items()}
        writer.writerow(cells)
    return text.getvalue()


def learning_curve(rows: Sequence[Row], title: str) -> bytes:
    """A PNG: the losses in one panel, every other metric in one of its own, over the epochs.

    >>> learning_curve([{"epoch": 1, "step": 4, "lr": 0.1, "train_loss": 0.7}], "A run")[1:4]
    b'PNG'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(rows)
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.8 * columns, 0.5 + 3.4 * lines), dpi=120, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, (label, names) in zip(axes, panels.items(), strict=False):
        _draw(axis, rows, label, names)
    for axis in list(figure.axes)[len(panels) :]:
        axis.set_axis_off()
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)  # type: ignore[no-untyped-call]
    return picture.getvalue()


def _panels(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Axis label -> the columns drawn there."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    losses = [name for name in names if "loss" in name]
    others = [n for n in names if n not in ("epoch", "step", "lr", *losses)]
    return {"loss (mean over the batches)": losses, **{f"{n} (as logged)": [n] for n in others}}


def _draw(axis: Any, rows: Sequence[Row], label: str, names: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for name in names:
        points = [(row["epoch"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), marker=".", label=name)
    axis.set_xlabel("epoch (passes over the training data)")
    axis.set_ylabel(label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if len(names) > 1:
        axis.legend()
