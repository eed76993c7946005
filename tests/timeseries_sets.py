"""Adapter files of small time series models, and tables to use them on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from polyadapt.core import LoRA
from polyadapt.timeseries.aim import Aim
from polyadapt.timeseries.aims import Forecast
from polyadapt.timeseries.backbones import GPT2, Backbone, NoLanguageModel
from polyadapt.timeseries.description import Keep
from polyadapt.timeseries.scaling import Scaler
from polyadapt.timeseries.task import SeriesTask

LOOK_BACK, HORIZON = 48, 24
NAMES = ("load", "OT")
SCALER = Scaler((10.0, -3.0), (2.0, 5.0))
FORECAST = Forecast(horizon=HORIZON)
BARE = NoLanguageModel(width=8)
TINY = GPT2(
    blocks=2,
    pretrained=False,
    options={"n_embd": 8, "n_head": 2, "n_positions": 32, "vocab_size": 1},
)


def saved_set(
    path: Path,
    aim: Aim = FORECAST,
    backbone: Backbone = BARE,
    names: tuple[str, ...] | None = NAMES,
    scaler: Scaler | None = SCALER,
    frequency: str | None = "h",
    frozen_layers: Keep = "seed",
) -> Path:
    """A file as a run would leave it, with adapters that act."""
    recipe = LoRA(rank=2, scaling="rank_stabilised")
    task = SeriesTask(
        backbone, recipe, aim=aim, look_back=LOOK_BACK, seed=0, frozen_layers=frozen_layers
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in task.adapters.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    said = {
        "names": None if names is None else list(names),
        "scaler": None if scaler is None else scaler.to_json(),
        "frequency": frequency,
        "period": 24,
    }
    task.adapters.extra = {**task.about.to_json(), **said}
    task.save_adapter(path)
    return path


def table(path: Path, rows: int = 200, columns: tuple[str, ...] = NAMES, freq: str = "h") -> Path:
    """A CSV file of daily waves, with a column `date`."""
    import pandas as pd

    times = pd.date_range("2024-01-01", periods=rows, freq=freq)
    hours = np.arange(rows)
    waves = {
        name: (10 + k + np.sin(2 * np.pi * (hours + 3 * k) / 24)).round(4)
        for k, name in enumerate(columns)
    }
    pd.DataFrame({"date": times, **waves}).to_csv(path, index=False)
    return path
