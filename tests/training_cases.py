"""What the tests of training share: a small task, a silent trainer, and an early end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from polyadapt.core import AdaptedModule, RunFiles


def quiet_trainer(**settings: Any) -> Trainer:
    """One epoch on the CPU that shows and writes nothing, unless settings say otherwise."""
    shown = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger")
    quiet: dict[str, Any] = {"accelerator": "cpu", **dict.fromkeys(shown, False)}
    return Trainer(**{"max_epochs": 1, **quiet, **settings})


def trainer_in(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    """The same, which leaves the files of a run in a folder."""
    both = [*callbacks, RunFiles(folder)]
    kept = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
    return quiet_trainer(callbacks=both, **kept, **settings)


class Ones(AdaptedModule):
    """What the backbone puts out shall be one."""

    def training_loss(self, batch: Any) -> Tensor:
        loss: Tensor = (self.backbone(batch[0]) - 1).square().mean()
        return loss


class StopAfter(Callback):
    """Ends a run early that was planned for longer."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs
