"""What the configurations of the time series domain are made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from ..core.configuration import Domain
from ..core.errors import AdaptError
from ..core.run_folder import write_test_table
from .aim import Aim
from .aims import Classify, Forecast, Impute, Reconstruct
from .backbones import Backbone
from .data import SeriesData
from .data_anomaly import AnomalyTable
from .data_competition import CompetitionData
from .data_labelled import UCR
from .description import describe
from .task import SeriesTask

TEST_TABLE = "test_metrics.csv"
_NEXT: dict[type[Aim], str] = {
    Forecast: "forecast TABLE --time COLUMN --set {adapter}",
    Classify: "predict TABLE --set {adapter}",
    Reconstruct: "predict TABLE --normal TABLE --set {adapter}",
    Impute: "predict TABLE --time COLUMN --set {adapter}",
}


class Measured(Callback):
    """Writes the metrics of the test part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:  # scores are of windows in the order of time, each once
            raise AdaptError(f"test with --trainer.devices 1, not with {trainer.world_size}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            write_test_table(self.folder, TEST_TABLE, trainer)
            print(f"metrics: {self.folder / TEST_TABLE}", flush=True)


def _backbone_of(set_file: str | Path) -> Backbone:
    return describe(set_file).backbone


def _refuse_file(set_file: str | Path, model: Mapping[str, Any]) -> None:
    """A set of another aim would be measured under the names and in the folder of this one."""
    said, aim = model.get("aim"), type(describe(set_file).aim).__name__
    path = said["class_path"] if isinstance(said, Mapping) else said
    if path is not None and str(path).rpartition(".")[2] != aim:
        raise AdaptError(f"{set_file} was trained to {aim}, the configuration says {path}")


def _check(task: SeriesTask, data: LightningDataModule, trainer: Trainer) -> None:
    """Data of ours are read here: what does not fit must not have cost the folder its old run."""
    if not isinstance(data, SeriesData | CompetitionData | AnomalyTable | UCR):
        return
    task.tell(data)
    data.setup("fit")
    task.require_fit(data)
    data.train_dataloader()
    data.val_dataloader()


DOMAIN = Domain(
    name="timeseries",
    things="time series",
    task=SeriesTask,
    data=LightningDataModule,
    backbone=Backbone,
    subclasses=[Backbone, Aim],
    chosen={"model.aim": Aim},
    backbone_of=_backbone_of,
    refuse_file=_refuse_file,
    measured=Measured,
    test_files=[TEST_TABLE],
    check=_check,
    next_words=lambda task: _NEXT[type(task.aim)],
)
