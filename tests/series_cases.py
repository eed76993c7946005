"""Small time series models and data for tests."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from polyadapt.core import AdapterSet
from polyadapt.core.adapters.lora import LoRAAdapter
from polyadapt.timeseries.adapters import code
from polyadapt.timeseries.aim import Aim
from polyadapt.timeseries.aims import Forecast
from polyadapt.timeseries.backbones import GPT2, Backbone
from polyadapt.timeseries.scaling import Scaler
from polyadapt.timeseries.task import SeriesTask

SIZES: dict[str, Any] = {"n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": 1}
TINY = GPT2(pretrained=False, blocks=1, options=SIZES)


def tiny_task(aim: Aim | None = None, backbone: Backbone = TINY, **settings: Any) -> SeriesTask:
    """Look-back 24 and horizon 4 on one block of width 16, unless said otherwise."""
    given: dict[str, Any] = {"adapter": code(rank=4).recipe, "look_back": 24, "lr": 1e-2}
    return SeriesTask(backbone, aim=aim or Forecast(horizon=4), **given | settings)


def factors(adapters: AdapterSet, site: str) -> LoRAAdapter:
    """The pair at the position table ("wpe", "positions") or at the output layer."""
    (found,) = (adapter for name, adapter in adapters.adapters.items() if name.endswith(site))
    assert isinstance(found, LoRAAdapter)
    return found


def stir(adapters: AdapterSet) -> None:
    """Give every factor numbers, as training would."""
    generator = Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in adapters.parameters():
            tensor.normal_(std=0.1, generator=generator)


class Waves(LightningDataModule):
    """Sines of two channels with phases of their own; 48 windows for every part."""

    names: tuple[str, ...] = ("left", "right")
    frequency = "h"
    period = 24
    scaler = Scaler((1.0, -2.0), (2.0, 0.5))

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.look_back: int | None = None
        self.horizon: int | None = None

    def windows(self, seed: int) -> list[tuple[Tensor, ...]]:
        assert self.look_back is not None
        assert self.horizon is not None
        start = torch.rand(48, 1, 2, generator=Generator().manual_seed(seed)) * 6
        steps = torch.arange(self.look_back + self.horizon).view(1, -1, 1)
        x = torch.sin(start + steps * 0.5)
        return list(zip(x[:, : self.look_back], x[:, self.look_back :], strict=True))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.windows(0), self.batch_size, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.windows(1), self.batch_size)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.windows(2), 20)  # type: ignore[arg-type]
