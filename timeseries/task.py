"""One-for-All: a frozen network, adapters at its position table and output layer, and one aim."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast, get_args

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from ..core.adapters.head_only import HeadOnly
from ..core.errors import AdaptError
from ..core.recipe import Recipe, require, require_finite
from ..core.training import AdaptedModule
from . import blocks
from .adapters import Schedule
from .aim import Aim, Batch, Example
from .aims import Forecast, Reconstruct
from .anomaly import AnomalyMetric
from .backbones import Backbone
from .contest_metric import ContestMetric
from .data_competition import CompetitionData
from .description import Description, Keep, describe, load_set, network_of, sizes
from .network import Network, digest
from .patches import Patches

_LAYERS = "frozen layers"  # in a checkpoint's settings


class SeriesTask(AdaptedModule):
    """Trains adapters of a frozen `Network` for an aim: arXiv 2603.29756 with LoRA at both sites.

    Everything else stays frozen, the random dense layers included. They are drawn from
    `seed_of_layers`; the adapter file has that seed and their SHA-256 (`frozen_layers="seed"`), or
    the layers themselves ("tensors": at 336 -> 96 with GPT-2, 14.6 MB and not 2.2). `at` None means
    the network's two sites, if the method has none of its own; `in_layer` may be named, too.

    `schedule`: "constant", or "cosine" by epoch from `lr` to `last_lr` in `cosine_epochs`;
    `adapters.paper()` and `adapters.code()` hold what was published. AdamW without weight decay is
    Adam. In training the dropout of the blocks acts, as in the authors' code (0.1 for GPT-2;
    `dropout` sets another); in validation, unlike there, none does.

    Validation and test log the aim's loss and measures as means over all windows; a test on a
    competition adds its sMAPE, MASE and OWA. Look-back and horizon are told to the data; its names,
    scaler and season travel in the file. The other
    settings are `AdaptedModule`'s. Raises `AdaptError` for settings out of range and data that
    does not fit the aim.

    >>> from polyadapt.timeseries.adapters import code
    >>> from polyadapt.timeseries.aims import Forecast
    >>> from polyadapt.timeseries.backbones import NoLanguageModel
    >>> task = SeriesTask(
    ...     NoLanguageModel(width=32), code().recipe, aim=Forecast(horizon=24), look_back=48
    ... )
    >>> task(torch.zeros(2, 48, 3)).shape, task.adapters.trainable_count()
    (torch.Size([2, 24, 3]), 20352)
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: Recipe,
        at: str | list[str] | None = None,
        *,
        aim: Aim,
        look_back: int = 336,
        patches: Patches = Patches(),  # noqa: B008
        seed_of_layers: int = 0,
        frozen_layers: Keep = "seed",
        dropout: float | None = None,
        schedule: Schedule = "constant",
        cosine_epochs: int = 20,
        last_lr: float = 1e-8,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        **training: Any,
    ) -> None:
        _require(frozen_layers, dropout, schedule, cosine_epochs)
        require_finite("training", last_lr=last_lr)
        require(0 <= last_lr <= lr, f"last_lr={last_lr} is not allowed: from 0 to lr={lr}")
        network = network_of(backbone, aim, look_back, patches, seed_of_layers)
        if dropout is not None:
            network.blocks.set_dropout(dropout)
        if at is None and type(adapter).default_at is Recipe.default_at:
            at = network.sites
        held = network.frozen_layers()  # as they are drawn: merging gives others
        super().__init__(
            network, adapter, at, lr=lr, weight_decay=weight_decay, warmup=0.0, **training
        )
        self._held = held
        self.aim = aim
        self.schedule = schedule
        self.cosine_epochs = cosine_epochs
        self.last_lr = last_lr
        self.about = Description(
            backbone,
            look_back,
            patches,
            aim,
            seed_of_layers,
            frozen_layers,
            digest(held),
            blocks=blocks.digest(network.blocks),
        )
        found = {part: aim.metric(part) for part in ("val", "test")}
        self.metrics = nn.ModuleDict({k: m for k, m in found.items() if m is not None})
        self._describe()

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The task of an adapter file, to be validated and tested; the file says everything."""
        about = describe(path)
        task = cls(
            about.backbone,
            HeadOnly(),
            aim=about.aim,
            look_back=about.look_back,
            patches=about.patches,
            seed_of_layers=about.seed,
            frozen_layers=about.kept,
        )
        task.adapters.detach()
        load_set(task.network, path, task.set_name)
        task.about = about
        return task

    @property
    def network(self) -> Network:
        """The frozen network, with the adapters."""
        return cast(Network, self.backbone)

    def setup(self, stage: str) -> None:
        """Tell the data what windows the network takes, and note what the data is."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            return
        self.tell(data)
        self.require_fit(data)
        if stage == "test" and isinstance(self.aim, Forecast) and isinstance(data, CompetitionData):
            self.metrics["test"] = ContestMetric(data)
        if stage == "fit":
            self.about = self.about.of(data)
            self._describe()

    def tell(self, data: object) -> None:
        """Tell data what windows the network takes."""
        for name, value in (("look_back", self.about.look_back), ("horizon", self.aim.steps_ahead)):
            if hasattr(data, name):
                setattr(data, name, value)

    def require_fit(self, data: object) -> None:
        """Refuse data, read by now, that are not for the aim."""
        if misfit := self.aim.misfit(data):
            raise AdaptError(misfit)

    def forward(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """Windows x [b, L, C] -> the aim's answer."""
        return self.aim.answer(self.network, x, observed)

    def training_loss(self, batch: Batch) -> Tensor:
        example = self.aim.example(batch, None)
        return self.aim.loss_of(self._answer(example), example)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure("test", batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._tell("val")

    def on_test_epoch_end(self) -> None:
        self._tell("test")

    @torch.no_grad()
    def on_test_start(self) -> None:
        """An anomaly's threshold comes from the training windows."""
        if not isinstance(self.aim, Reconstruct):
            return
        metric = cast(AnomalyMetric, self.metrics["test"])
        data: LightningDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        for batch in data.train_dataloader():
            example = self.aim.example(self.transfer_batch_to_device(batch, self.device, 0), None)
            metric.learn(self.aim.scores(self._answer(example), example.x))

    def _answer(self, example: Example) -> Tensor:
        return self.aim.answer(self.network, example.x, example.observed)

    def _measure(self, part: str, batch: Batch, number: int) -> None:
        # A generator per batch: what is hidden is the same in every epoch and for every method.
        example = self.aim.example(batch, Generator().manual_seed(number))
        answer = self._answer(example)
        found = self.aim.measures(answer, example)
        values = {"loss": self.aim.loss_of(answer, example), **found.values}
        for name, value in values.items():
            self.log(f"{part}_{name}", value, batch_size=found.count, sync_dist=True)
        if part in self.metrics:
            cast(Any, self.metrics[part]).update(*self.aim.judged(answer, example))

    def _tell(self, part: str) -> None:
        if part in self.metrics:
            metric = cast(Any, self.metrics[part])
            self.log_dict(metric.compute())
            metric.reset()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The base's AdamW; its rate stays, or falls as a cosine from epoch to epoch."""
        made = super().configure_optimizers()
        optimizer = made["optimizer"]
        scheduler: Any
        if self.schedule == "cosine":
            scheduler = CosineAnnealingLR(optimizer, self.cosine_epochs, eta_min=self.last_lr)
        else:
            scheduler = LambdaLR(optimizer, lambda _: 1.0)
        return {**made, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def _settings(self) -> dict[str, Any]:
        own = {
            "schedule": self.schedule,
            "cosine_epochs": self.cosine_epochs,
            "last_lr": self.last_lr,
            "look_back": self.about.look_back,
            "patches": self.about.patches.to_json(),
            "aim": self.aim.to_json(),
            _LAYERS: self.about.sha256,
        }
        return {**super()._settings(), **own}

    def _refuse_other_settings(self, saved: Mapping[str, Any], fitting: bool) -> None:
        super()._refuse_other_settings(saved, fitting)
        if saved.get(_LAYERS) != self.about.sha256:  # also where it is only measured
            raise AdaptError(
                "the checkpoint was trained on other frozen layers: use its seed_of_layers"
                f" (SHA-256 {str(saved.get(_LAYERS))[:12]}..., not {self.about.sha256[:12]}...)"
            )

    def _own_state(self) -> dict[str, Tensor]:
        """What the adapter file holds beside the adapters."""
        held = self._held if self.about.kept == "tensors" else {}
        return {**super()._own_state(), **held}

    def _describe(self) -> None:
        found = sizes(self.adapters, self.network)
        self.adapters.extra = {**self.about.to_json(), "bytes": found}


def _require(kept: Keep, dropout: float | None, schedule: Schedule, cosine_epochs: int) -> None:
    for name, value, choices in (
        ("frozen_layers", kept, get_args(Keep)),
        ("schedule", schedule, get_args(Schedule)),
    ):
        require(value in choices, f"{name}={value!r} is not allowed: {' or '.join(choices)}")
    require(
        dropout is None or 0 <= dropout < 1,
        f"dropout={dropout} is not allowed: 0 to below 1, or null for the language model's own",
    )
    require(cosine_epochs >= 1, f"cosine_epochs={cosine_epochs} is not allowed: from 1")
