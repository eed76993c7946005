"""How every method of a comparison is trained and measured: one loop, one rule, one test."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from ..core.errors import AdaptError
from ..core.order import EpochSampler
from ..core.recipe import require, require_finite
from ..core.sets import AdapterSet
from .data import SeriesData

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The settings that all methods share.

    Adam without weight decay on the mean squared error; the rate falls along a cosine to 0 over all
    steps of `epochs`. After each epoch the error on the development windows (every `every`-th of
    each channel); the epoch where it is least is kept, and `patience` epochs without a better one
    end the training. Dropout acts in training only. `windows_per_epoch`: train on so many windows,
    drawn once by the seed, instead of all; `few`: keep only the earliest share of training rows.
    """

    epochs: int = 10
    patience: int = 3
    batch_size: int = 256
    windows_per_epoch: int | None = None
    every: int = 1
    few: float = 1.0

    def __post_init__(self) -> None:
        for name in ("epochs", "patience"):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value} is not allowed: a whole number from 1")

    def data_settings(self, seed: int) -> dict[str, Any]:
        """Of a `SeriesData`."""
        return {
            "batch_size": self.batch_size,
            "windows_per_epoch": self.windows_per_epoch,
            "every": self.every,
            "few": self.few,
            "seed": seed,
        }

    def to_json(self) -> dict[str, Any]:
        """What a record's settings are made of."""
        return asdict(self)


@dataclass(frozen=True)
class Candidate:
    """What is compared: past [b, L, c] -> future [b, T, c], training what needs gradients.

    `drawn`: its frozen tensors that were drawn at random; a file that must work without the seed
    holds them, too. Tensors of a public backbone are not among them.
    """

    model: nn.Module
    adapters: AdapterSet | None = None
    drawn: Sequence[Tensor] = ()

    def trained(self) -> list[nn.Parameter]:
        """What the optimiser gets."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def stored(self) -> list[Tensor]:
        """What was trained, and running statistics of it (batch norm's)."""
        statistics = [
            m for m in self.model.modules() if getattr(m, "running_mean", None) is not None
        ]
        kept = [b for m in statistics for b in (m.running_mean, m.running_var)]
        return [*self.trained(), *(b for b in kept if isinstance(b, Tensor))]

    def left_out(self) -> list[Tensor]:
        """What was drawn and is still as it was drawn."""
        return [tensor for tensor in self.drawn if not tensor.requires_grad]


@dataclass(frozen=True)
class Errors:
    """Means over all items, steps and channels."""

    mse: float
    mae: float
    items: int


@dataclass(frozen=True)
class Fitted:
    """A training that has ended; the model holds the best epoch."""

    epochs: int
    best_epoch: int
    steps: int
    val: Errors
    seconds: float


def fit(candidate: Candidate, data: SeriesData, how: Protocol, lr: float) -> Fitted:
    """Train and keep the best epoch; `AdaptError` for a rate out of range and a loss not finite."""
    require_finite("fit", lr=lr)
    require(lr > 0, f"lr={lr} is not allowed: above 0")
    begin, loader, steps = time.perf_counter(), data.train_dataloader(), 0
    optimizer = _optimizer(candidate, lr)
    schedule = CosineAnnealingLR(optimizer, T_max=how.epochs * len(loader))
    best: tuple[Errors, int, list[Tensor]] | None = None
    epoch = 0
    while epoch < how.epochs:
        if isinstance(loader.sampler, EpochSampler):
            loader.sampler.set_epoch(epoch)
        epoch += 1
        candidate.model.train()
        for past, future in _where(candidate.model, loader):
            steps += 1
            _step(candidate, past, future, optimizer, steps, how.epochs * len(loader))
            schedule.step()
        found = measure(candidate.model, data.val_dataloader())
        if best is None or found.mse < best[0].mse:
            best = found, epoch, [tensor.detach().clone() for tensor in candidate.stored()]
        elif epoch - best[1] >= how.patience:
            break
    assert best is not None, "there is an epoch at least"
    with torch.no_grad():
        for tensor, kept in zip(candidate.stored(), best[2], strict=True):
            tensor.copy_(kept)
    return Fitted(epoch, best[1], steps, best[0], time.perf_counter() - begin)


def measure(model: nn.Module, batches: Batches) -> Errors:
    """Squared and absolute error, summed in fp64 over items: no batch counts more than its size."""
    squared, absolute, numbers, items = 0.0, 0.0, 0, 0
    model.eval()
    with torch.no_grad():
        for past, future in _where(model, batches):
            difference = (model(past) - future).double()
            squared += float(difference.square().sum())
            absolute += float(difference.abs().sum())
            numbers += difference.numel()
            items += len(past)
    if not math.isfinite(squared):
        raise AdaptError("the forecasts are not finite: lower the learning rate")
    return Errors(squared / numbers, absolute / numbers, items)


def _where(model: nn.Module, batches: Batches) -> Batches:
    """The batches on the device of the model."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return ((past.to(device), future.to(device)) for past, future in batches)


def _step(
    candidate: Candidate, past: Tensor, future: Tensor, optimizer: Adam, step: int, total: int
) -> None:
    loss = (candidate.model(past) - future).square().mean()
    if candidate.adapters is not None:
        loss = loss + candidate.adapters.penalty()
    if not bool(loss.isfinite()):
        raise AdaptError(
            f"step {step}: the loss is {float(loss.detach())}: lower the learning rate"
        )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if candidate.adapters is not None:
        candidate.adapters.after_step(step, total)


def _optimizer(candidate: Candidate, lr: float) -> Adam:
    if candidate.adapters is None:
        return Adam(candidate.trained(), lr=lr)
    return Adam(candidate.adapters.parameter_groups(lr), lr=lr)
