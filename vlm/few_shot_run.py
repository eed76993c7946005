"""One run of a few-shot comparison: a method with a number of shots and a seed."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from ..core.images.data import ImageData
from ..core.records import digest, read_record, write_record
from .backbones import Backbone
from .baselines import LinearProbe, TipAdapter, accuracy, linear_probe, zero_shot
from .data_words import Where, require_test
from .frozen_features import FrozenFeatures
from .methods import Method
from .prompts import COMMON
from .records import Record

if TYPE_CHECKING:
    from .task import ImageTextClassification


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What all methods share."""

    backbone: Backbone
    where: Where
    template: str = COMMON
    steps_per_shot: int = 500
    batch_size: int = 32
    views: int = 10
    text_chunk: int | None = None

    def data_settings(self, shots: int, seed: int) -> dict[str, Any]:
        """What every data module has; without validation images, as the protocol is."""
        return {
            "shots": shots,
            "seed": seed,
            "batch_size": self.batch_size,
            "val_share": 0.0,
            "augmentation": "random_resized_crop",
        }

    def data(self, shots: int, seed: int) -> ImageData:
        """The data module of one run."""
        return self.where.module(**self.data_settings(shots, seed))

    def words(self, method: Method, shots: int, seed: int) -> list[str]:
        """One run as the words of `polyadapt vlm fit`; the last of two that differ counts."""
        spec = self.backbone.to_json()
        backbone = {"class_path": spec.pop("backbone"), "init_args": spec}
        data = self.where.spec(**self.data_settings(shots, seed))
        return [
            *method.words,
            f"--model.backbone={json.dumps(backbone)}",
            f"--model.template={self.template}",
            f"--model.steps_per_shot={self.steps_per_shot}",
            f"--model.text_chunk={json.dumps(self.text_chunk)}",
            f"--data={json.dumps(data)}",
            f"--seed_everything={seed}",
            "--trainer.limit_val_batches=0",
            "--trainer.enable_progress_bar=false",
        ]

    def settings(self, method: Method, shots: int, seed: int) -> str:
        """SHA-256 of all that a run depends on, its data's content excepted."""
        if method.words:  # read once for all shots and seeds: it takes a second
            return digest([_configuration(tuple(self.words(method, 1, 0))), shots, seed])
        if not method.learns:
            shots = seed = 0
        data = {**self.where.settings, **self.data_settings(shots, seed)}
        backbone = self.backbone.to_json()
        # Of the others, which have no views, settings are those of the default number.
        views = self.views if method.name.startswith("tip-adapter") else Comparison.views
        return digest([method.name, backbone, data, self.template, views])

    @cached_property
    def frozen(self) -> FrozenFeatures:
        """What the baselines work on; computed only where one of them has to be run."""
        return FrozenFeatures(self.backbone, self.data, self.template)


@dataclass(frozen=True)
class Run:
    """One method with one number of shots and one seed; `folder` gets its files and its record."""

    shared: Comparison
    method: Method
    shots: int
    seed: int
    out: Path

    @property
    def folder(self) -> Path:
        """Named after what it is."""
        if not self.method.learns:
            return self.out / self.method.name
        return self.out / f"{self.method.name}-{self.shots}-shot-seed{self.seed}"

    def finished(self) -> Record | None:
        """The record, if it is there; nothing is run."""
        settings = self.shared.settings(self.method, self.shots, self.seed)
        return read_record(Record, self.folder, settings)

    def record(self) -> Record:
        """Train and measure."""
        measured = self._fitted() if self.method.words else self._baseline()
        backbone = self.shared.backbone.to_json()
        found = Record(
            method=self.method.name,
            shots=self.shots if self.method.learns else 0,
            seed=self.seed,
            backbone=str(backbone.get("name", backbone["backbone"])),
            data=self.shared.where.title,
            template=self.shared.template,
            settings=self.shared.settings(self.method, self.shots, self.seed),
            **measured,
        )
        write_record(self.folder, found)
        return found

    def _baseline(self) -> dict[str, Any]:
        frozen = self.shared.frozen
        data = frozen.shots(self.shots, self.seed)
        classes, (images, labels) = frozen.classes_of(data), frozen.test(data)
        start, numbers = time.perf_counter(), 0
        if self.method.learns:
            views = 0 if self.method.name == "linear-probe" else self.shared.views
            shots = frozen.train(data, views)
            probe = _trained(self.method.name, shots, classes, self.seed)
            logits, numbers = probe.logits(images), _numbers(probe)
        else:
            logits = zero_shot(images, classes)
        return {
            "top1": accuracy(logits, labels),
            "classes": len(classes),
            "train_images": len(data.images("train")) if self.method.learns else 0,
            "test_images": len(labels),
            "trainable": 0 if self.method.name == "tip-adapter" else numbers,
            "stored": numbers,
            "steps": 0,
            "seconds": time.perf_counter() - start,
            "memory_mib": None,
        }

    def _fitted(self) -> dict[str, Any]:
        import torch

        from ..core.complaints import errors_in_one_line
        from ..core.configuration import DomainCLI
        from ..core.fitting import calm, measure, train
        from ..core.run_folder import ADAPTER, CONFIG
        from .configuration import DOMAIN

        words = self.shared.words(self.method, self.shots, self.seed)
        gpu = torch.cuda.is_available()
        with calm(), errors_in_one_line():
            cli = DomainCLI(DOMAIN, "fit", [*words, f"--run={self.folder}"])
            _require_test(cli.datamodule, cli.model)
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            train(cli)
            seconds = time.perf_counter() - start
            peak = torch.cuda.max_memory_allocated() / 2**20 if gpu else None
            saved = [f"--config={self.folder / CONFIG}", f"--set={self.folder / ADAPTER}"]
            metrics = measure(DOMAIN, "test", saved, verbose=False)
        return {
            "top1": metrics["test_top1"],
            "classes": len(cli.model.classes),
            "train_images": len(cli.datamodule.images("train")),
            "test_images": len(cli.datamodule.images("test")),
            "trainable": cli.model.adapters.trainable_count(),
            "stored": cli.model.adapters.stored_count(),
            "steps": cli.trainer.global_step,
            "seconds": seconds,
            "memory_mib": peak,
        }


def _require_test(data: ImageData, task: ImageTextClassification) -> None:
    """Before hours of training."""
    data.prepare_data()
    data.setup()
    data.preprocessing = task.preprocessing
    require_test(data)


def _trained(
    name: str, shots: tuple[Tensor, Tensor, Tensor], classes: Tensor, seed: int
) -> LinearProbe | TipAdapter:
    images, views, labels = shots
    if name == "linear-probe":
        return linear_probe(images, labels)
    cache = TipAdapter.of(F.normalize(views.mean(0), dim=-1), labels, classes)
    return cache if name == "tip-adapter" else cache.fine_tuned(views, labels, seed=seed)


def _numbers(probe: LinearProbe | TipAdapter) -> int:
    """What is kept besides the model and its prompts."""
    if isinstance(probe, TipAdapter):
        return probe.keys.numel()
    return probe.weight.numel() + probe.bias.numel()


@cache
def _configuration(words: tuple[str, ...]) -> str:
    """A run's whole configuration; read and checked, nothing is built."""
    from ..core.complaints import errors_in_one_line
    from ..core.configuration import DomainCLI
    from ..core.fitting import calm
    from .configuration import DOMAIN

    with calm(), errors_in_one_line():
        return DomainCLI(DOMAIN, "fit", words, build=False).effective()
