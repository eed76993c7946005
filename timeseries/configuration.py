"""What the configurations of the time series domain are made of."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from ..core.configuration import Domain
from ..core.run_folder import write_test_table
from . import data as data  # data modules are found by their short names
from . import data_anomaly as data_anomaly
from . import data_competition as data_competition
from . import data_labelled as data_labelled
from .aim import Aim
from .backbones import Backbone
from .description import describe
from .task import SeriesTask

TEST_TABLE = "test_metrics.csv"


class Measured(Callback):
    """Writes the metrics of the test part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            write_test_table(self.folder, TEST_TABLE, trainer)
            print(f"metrics: {self.folder / TEST_TABLE}", flush=True)


def _backbone_of(set_file: str | Path) -> Backbone:
    return describe(set_file).backbone


DOMAIN = Domain(
    name="timeseries",
    things="time series",
    task=SeriesTask,
    data=LightningDataModule,
    backbone=Backbone,
    subclasses=[Backbone, Aim],
    chosen={"model.aim": Aim},
    backbone_of=_backbone_of,
    measured=Measured,
    test_files=[TEST_TABLE],
    next_words="forecast TABLE --time COLUMN --set {adapter}",
)
