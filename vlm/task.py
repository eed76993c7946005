"""Few-shot classification with an image-text model: its own classifier of prompts, adapted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection

from ..core.adapters.head_only import HeadOnly
from ..core.errors import AdaptError
from ..core.images.data import ImageData
from ..core.images.measured import class_metrics
from ..core.images.preprocessing import Preprocessing
from ..core.recipe import Recipe, require, require_finite
from ..core.training import AdaptedModule
from .adapters import load_set
from .backbones import Backbone
from .description import Description, describe
from .names import Encoder, Layers, sites_for
from .prompts import COMMON, class_tokens, template_of
from .text_features import TextFeatures, require_chunk

Batch = Sequence[Tensor]  # images and labels


class ImageTextClassification(AdaptedModule):
    """Trains adapters of one tower or both: logits = scale f(image) g(prompt)^T, no head.

    f and g are the features of length 1 of the adapted towers; every step encodes the prompts of
    all classes, see `TextFeatures`. The loss is the cross entropy. Validation and test report the
    loss, top-1 accuracy, macro F1 and the calibration error (15 bins), all from 0 to 1.

    The defaults are CLIP-LoRA's (arXiv 2405.18541, as its code has them), whose method is
    `adapters.CLIP_LORA`: q, k, v of every attention of both towers; `scale` 100 (None: the
    checkpoint's own); one template; AdamW; the rate as a cosine from `lr` to `last_lr` without
    warm-up; `steps_per_shot` K optimiser steps for data with K shots, whatever the trainer's
    max_epochs, unless its max_steps is set. Data without a number of shots, or None, leave that to
    the trainer.

    `encoder`, `parts` and `layers` choose the sites (see `sites_for`) unless `at` or the method
    names them. `text_chunk` prompts at a time go through the text tower, for less memory and the
    same gradients. The other settings are `AdaptedModule`'s. Backbone, preprocessing, classes,
    template and scale travel in the adapter file. `AdaptError` for settings out of range, prompts
    that cannot be told apart or do not fit the context.

    >>> from polyadapt.core import LoRA
    >>> from polyadapt.vlm.backbones import OpenCLIP
    >>> small = OpenCLIP(name="ViT-S-32-alt", pretrained=None)
    >>> task = ImageTextClassification(small, LoRA(rank=2), classes=["cat", "dog"])
    >>> task(torch.zeros(1, 3, 224, 224)).shape
    torch.Size([1, 2])
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: Recipe,
        at: str | list[str] | None = None,
        *,
        encoder: Encoder = "both",
        parts: str = "qkv",
        layers: Layers = "all",
        template: str = COMMON,
        scale: float | None = 100.0,
        classes: list[str] | None = None,
        preprocessing: Preprocessing | None = None,
        text_chunk: int | None = None,
        steps_per_shot: int | None = 500,
        lr: float = 2e-4,
        last_lr: float = 1e-6,
        weight_decay: float = 1e-2,
        **training: Any,
    ) -> None:
        require_chunk(text_chunk)
        require_finite("training", last_lr=last_lr, scale=1.0 if scale is None else scale)
        require(scale is None or scale > 0, f"scale={scale} is not allowed: above 0")
        require(0 <= last_lr <= lr, f"last_lr={last_lr} is not allowed: from 0 to lr={lr}")
        steps = 1 if steps_per_shot is None else steps_per_shot
        require(steps >= 1, f"steps_per_shot={steps_per_shot} is not allowed: from 1, or null")
        template = template_of(template)
        model = backbone.build()
        if at is None and _needs_sites(adapter):
            at = sites_for(model, encoder, tuple(parts), layers)
        super().__init__(
            model, adapter, at, lr=lr, weight_decay=weight_decay, warmup=0.0, **training
        )
        self.spec = backbone
        self.pair = backbone.image_text(self.backbone)
        self.preprocessing = preprocessing or self.pair.preprocessing
        self.template = template
        self.scale = self.pair.scale if scale is None else float(scale)
        self.last_lr = last_lr
        self.text_chunk = text_chunk
        self.steps_per_shot = steps_per_shot
        self.classes: tuple[str, ...] = ()
        if classes is not None:
            self.name_classes(classes)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The task of an adapter file, to be validated and tested; the file says everything."""
        about = describe(path)
        task = cls(
            about.backbone,
            HeadOnly(),
            preprocessing=about.preprocessing,
            template=about.template,
            scale=about.scale,
            classes=list(about.classes),
        )
        task.adapters.detach()
        load_set(task.backbone, path, task.set_name)
        return task

    def setup(self, stage: str) -> None:
        """Take the class names from the data, tell it what the backbone wants, count the steps."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit":
            self._limit_steps(self.trainer, getattr(data, "shots", None))
        if not isinstance(data, ImageData):
            return
        if not self.classes:
            self.name_classes(data.classes)
        if data.classes != self.classes:
            raise AdaptError(f"the prompts are of {self.classes}, the data has {data.classes}")
        data.preprocessing = self.preprocessing

    def _limit_steps(self, trainer: Trainer, shots: int | None) -> None:
        if self.steps_per_shot is None or shots is None or trainer.max_steps != -1:
            return
        loop = trainer.fit_loop
        loop.max_epochs, loop.epoch_loop.max_steps = -1, self.steps_per_shot * shots

    def name_classes(self, classes: Sequence[str]) -> None:
        """Make the prompts and the metrics for these classes."""
        tokens = class_tokens(self.pair.tokenize, classes, self.template)
        self.classes = tuple(classes)
        self.texts = TextFeatures(self.pair, tokens, self.text_chunk)
        self.metrics = nn.ModuleDict(
            {part: class_metrics(part, len(classes)) for part in ("val", "test")}
        )
        about = Description(self.spec, self.preprocessing, self.classes, self.template, self.scale)
        self.adapters.extra = about.to_json()

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, 3, h, w] -> logits [n, classes]."""
        if not self.classes:
            raise AdaptError("the classes are not known yet: pass classes=, or fit on data")
        # Texts first: backward then begins with the images, and what they kept is free before the
        # first chunk of texts runs again.
        texts = self.texts()
        features = self.pair.image_features(images)
        with torch.autocast(images.device.type, enabled=False):  # 100 in bfloat16 is 100 +- 0.25
            return self.scale * features.float() @ texts.float().T

    def training_loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._measure("test", batch)

    def _measure(self, part: str, batch: Batch) -> Tensor:
        """Log a batch's metrics; its predicted classes are returned for the confusion matrix."""
        logits, labels = self(batch[0]), batch[1]
        metrics = self.metrics[part]
        assert isinstance(metrics, MetricCollection)
        metrics.update(logits.softmax(-1), labels)
        loss, size = F.cross_entropy(logits, labels), len(labels)
        self.log(f"{part}_loss", loss, batch_size=size, sync_dist=True)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=size)
        predicted: Tensor = logits.argmax(-1)
        return predicted

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The base's optimiser; its rate falls from `lr` to `last_lr` over all optimiser steps."""
        made = super().configure_optimizers()
        total, last = self._total_steps() or 1, self.last_lr / self.lr
        schedule = LambdaLR(made["optimizer"], lambda step: cosine(step, total, last))
        return {**made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _settings(self) -> dict[str, Any]:
        own = {"last_lr": self.last_lr, "scale": self.scale, "template": self.template}
        return {**super()._settings(), **own}


def cosine(step: int, total: int, last: float) -> float:
    """The share of the learning rate at a 0-based step of `total`.

    last + (1 - last) (1 + cos(pi step / total)) / 2, which is 1 at step 0 and `last` at `total`.

    >>> [round(cosine(step, 4, 0.2), 4) for step in (0, 2, 4)]
    [1.0, 0.6, 0.2]
    """
    return last + (1 - last) * (1 + math.cos(math.pi * min(1.0, step / total))) / 2


def _needs_sites(recipe: Recipe) -> bool:
    """The method has none of its own."""
    return type(recipe).default_at is Recipe.default_at
