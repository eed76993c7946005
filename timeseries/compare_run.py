"""One run of a comparison of forecasters: a method at a horizon with a seed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adapters.lora import LoRA
from ..core.building import seeded
from ..core.errors import AdaptError
from ..core.records import digest, read_record, write_record
from .backbones import Backbone
from .data import SeriesData
from .methods import Given, Method
from .patches import Patches
from .protocol import Fitted, Protocol, fit, measure


@dataclass(frozen=True, kw_only=True)
class Record:
    """Errors on the test windows, in units of the scaled channels, and what they cost."""

    method: str
    horizon: int
    seed: int
    look_back: int
    data: str
    backbone: str
    """Empty for a method that has none."""
    mse: float
    mae: float
    val_mse: float | None
    """On the development windows, of the epoch that was kept."""
    windows: int
    """Of the test, each channel's on its own."""
    train_windows: int
    """Per epoch."""
    trainable: int
    stored_bytes: int
    """What was trained."""
    whole_bytes: int
    """The same with all frozen tensors that were drawn at random."""
    lr: float
    epochs: int
    best_epoch: int
    steps: int
    fit_seconds: float
    test_seconds: float
    settings: str
    """SHA-256 of all that the run depends on."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What all methods share; `data` makes a data module of the settings of `SeriesData`."""

    path: Path
    kind: str
    data: Callable[..., SeriesData]
    look_back: int
    backbone: Backbone
    patches: Patches
    adapter: LoRA
    protocol: Protocol

    @cached_property
    def content(self) -> str:
        """SHA-256 of the table."""
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise AdaptError(f"cannot read {self.path}: {error.strerror}") from error

    def settings(self, method: Method, horizon: int, seed: int) -> str:
        """The digest that a finished run is known by."""
        said: dict[str, Any] = {
            "method": method.name,
            "data": [self.kind, self.content],
            "look_back": self.look_back,
            "horizon": horizon,
        }
        if method.learns:
            said |= {"seed": seed, "lr": method.lr, "protocol": self.protocol.to_json()}
        if method.language:
            backbone, adapter = self.backbone.to_json(), self.adapter.to_json()
            said |= {"backbone": backbone, "patches": self.patches.to_json(), "adapter": adapter}
        return digest(said)

    def require_windows(self, horizon: int) -> SeriesData:
        """The data, unless a part has no window of this horizon."""
        data = self.windows(horizon, seed=0)
        for part in ("train", "val", "test"):
            data.windows(part)
        return data

    def windows(self, horizon: int, seed: int) -> SeriesData:
        """The data of one run, read."""
        data = self.data(**self.protocol.data_settings(seed))
        data.look_back, data.horizon = self.look_back, horizon
        data.setup()
        return data


@dataclass(frozen=True)
class Run:
    """One method at one horizon with one seed; `folder` gets its record."""

    shared: Comparison
    method: Method
    horizon: int
    seed: int
    out: Path

    @property
    def folder(self) -> Path:
        """Named after what it is."""
        seed = f"-seed{self.seed}" if self.method.learns else ""
        return self.out / f"{self.method.name}-{self.horizon}{seed}"

    @property
    def settings(self) -> str:
        """The digest that the record carries."""
        return self.shared.settings(self.method, self.horizon, self.seed)

    def finished(self) -> Record | None:
        """The record, if it is there; nothing is run."""
        return read_record(Record, self.folder, self.settings)

    def record(self) -> Record:
        """Train, measure all test windows once, write the record."""
        found = self._run()
        write_record(self.folder, found)
        return found

    def require_model(self, period: int) -> None:
        """Refuse a method that cannot be built, or does not take a window of this look-back."""
        candidate = self.method.build(self.given(period))
        with torch.no_grad():
            candidate.model.eval()(torch.zeros(1, self.shared.look_back, 1))

    def _run(self) -> Record:
        shared, method = self.shared, self.method
        data = shared.windows(self.horizon, self.seed)
        with seeded(self.seed):  # dropout draws from torch's global generator
            candidate = method.build(self.given(data.period))
            candidate.model.to("cuda" if torch.cuda.is_available() else "cpu")
            fitted = None
            if method.learns:
                fitted = fit(candidate, data, shared.protocol, method.lr)
        start = time.perf_counter()
        errors = measure(candidate.model, data.test_dataloader())
        seconds = time.perf_counter() - start
        return Record(
            method=method.name,
            horizon=self.horizon,
            seed=self.seed if method.learns else 0,
            look_back=shared.look_back,
            data=shared.path.stem,
            backbone=_called(shared.backbone) if method.language else "",
            mse=errors.mse,
            mae=errors.mae,
            windows=errors.items,
            train_windows=_train_windows(data) if method.learns else 0,
            trainable=sum(p.numel() for p in candidate.trained()),
            stored_bytes=_bytes(candidate.stored()),
            whole_bytes=_bytes([*candidate.stored(), *candidate.left_out()]),
            lr=method.lr,
            test_seconds=seconds,
            settings=self.settings,
            **_told(fitted),
        )

    def given(self, period: int) -> Given:
        """What the method is built from, for data with so many rows a season."""
        shared = self.shared
        return Given(
            look_back=shared.look_back,
            horizon=self.horizon,
            period=period,
            seed=self.seed,
            backbone=shared.backbone,
            patches=shared.patches,
            adapter=shared.adapter,
        )


def _told(fitted: Fitted | None) -> dict[str, Any]:
    if fitted is None:
        return {"val_mse": None, "epochs": 0, "best_epoch": 0, "steps": 0, "fit_seconds": 0.0}
    return {
        "val_mse": fitted.val.mse,
        "epochs": fitted.epochs,
        "best_epoch": fitted.best_epoch,
        "steps": fitted.steps,
        "fit_seconds": fitted.seconds,
    }


def _train_windows(data: SeriesData) -> int:
    there = len(data.windows("train"))
    return min(there, data.windows_per_epoch or there)


def _called(backbone: Backbone) -> str:
    """A backbone in a word or two."""
    said = backbone.to_json()
    name, blocks = said.get("name", said["backbone"]), said.get("blocks")
    return f"{name}, {blocks} blocks" if blocks else str(name)


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
