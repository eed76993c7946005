"""Image classification: a frozen backbone, one adapter set, one linear head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torchmetrics import MetricCollection

from ..core.adapters.head_only import HeadOnly
from ..core.adapters.mosa import symmetric_kl
from ..core.errors import AdaptError, require_word
from ..core.images.data import ImageData
from ..core.images.measured import class_metrics
from ..core.images.preprocessing import Mode, Preprocessing
from ..core.prefix_cache import PrefixCache
from ..core.recipe import Recipe
from ..core.store import load
from ..core.training import AdaptedModule
from .backbones import Backbone, feature_width
from .frozen_prefix import Keep, fill, folder_of, require_fixed_images
from .predict import TASK, describe

Batch = Sequence[Tensor]  # images, labels and, with `cache_prefix`, the images' numbers


class ImageClassification(AdaptedModule):
    """Trains adapters and a head: logits = W f(x) + b, images [n, c, h, w] -> [n, classes].

    f is the backbone with the set `adapter` at the sites `at`. The loss is the cross entropy with
    `label_smoothing`; for a recipe with consistency w > 0 (MoSA, arXiv 2312.02923) it is
    CE(z1) + w SKL(z1, z2) over two forwards of the batch. Validation and test report the loss,
    top-1 accuracy, macro F1 and the calibration error (15 bins), all from 0 to 1.

    `preprocessing` is the backbone's own, ImageNet's (AdapterTune's authors: for every backbone),
    one of VTAB-1k's (see `Preprocessing.in_mode`), or settings of your own. `classes` are the
    data's unless given. The other settings are `AdaptedModule`'s. Class names, preprocessing and
    backbone travel in the adapter file.

    `cache_prefix` computes the states of training and validation images that enter the first
    adapted block once, before training, and keeps up to `cache_bytes` of them in memory or on disk
    (in the run's folder, unnamed: gone with the run); see `PrefixCache`. Results are the same up to
    rounding. `AdaptError` for random augmentation, several processes and what cannot be kept.

    >>> from polyadapt.core import LoRA
    >>> from polyadapt.vision.backbones import TimmBackbone
    >>> vit = TimmBackbone(
    ...     name="vit_tiny_patch16_224", pretrained=False, img_size=32, options={"depth": 1}
    ... )
    >>> task = ImageClassification(vit, LoRA(rank=2), "blocks.*.attn.qkv", classes=["cat", "dog"])
    >>> task(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 2])
    """

    head: nn.Linear

    def __init__(
        self,
        backbone: Backbone,
        adapter: Recipe,
        at: str | list[str] | None = None,
        *,
        preprocessing: Mode | Preprocessing = "backbone",
        label_smoothing: float = 0.0,
        classes: list[str] | None = None,
        cache_prefix: Keep = "none",
        cache_bytes: int = 2 << 30,
        **training: Any,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise AdaptError(f"label_smoothing={label_smoothing} is not allowed: 0 to below 1")
        require_word("cache_prefix", cache_prefix, Keep)
        super().__init__(backbone.build(), adapter, at, **training)
        if cache_prefix != "none":  # refuses a backbone whose prefix it cannot keep
            PrefixCache(self.backbone, samples=1)
        self.cache_prefix = cache_prefix
        self.cache_bytes = cache_bytes
        self._cache: PrefixCache | None = None
        self.spec = backbone
        own = backbone.preprocessing(self.backbone)
        self.preprocessing = (
            own.in_mode(preprocessing) if isinstance(preprocessing, str) else preprocessing
        )
        self.label_smoothing = label_smoothing
        self.consistency: float = getattr(adapter, "consistency", 0.0)
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
            classes=list(about.classes),
        )
        task.adapters.detach()
        load(task.backbone, path, task.set_name)
        task.head.load_state_dict({"weight": about.weight, "bias": about.bias})
        return task

    def setup(self, stage: str) -> None:
        """Take the class names from the data, and tell the data what the backbone wants."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        keeps = stage == "fit" and self.cache_prefix != "none"
        if keeps:
            require_fixed_images(data, self.trainer)
        if not isinstance(data, ImageData):
            return
        if not self.classes:
            self.name_classes(data.classes)
        if data.classes != self.classes:
            raise AdaptError(f"the head knows {self.classes}, the data has {data.classes}")
        data.preprocessing = self.preprocessing
        data.numbered = keeps

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.cache_prefix == "none":
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        samples = len(data.numbered_images())
        folder = folder_of(self.trainer) if self.cache_prefix == "disk" else None
        self._cache = PrefixCache(self.backbone, samples, max_bytes=self.cache_bytes, folder=folder)
        few = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if not few:  # else a trial of a few batches would begin with all images
            fill(self._cache, data, self.trainer)

    def teardown(self, stage: str) -> None:
        self._cache = None
        if isinstance(data := self.trainer.datamodule, ImageData):  # type: ignore[attr-defined]
            data.numbered = False

    def name_classes(self, classes: list[str] | tuple[str, ...]) -> None:
        """Make the head and the metrics for these classes."""
        if len(classes) < 2:
            raise AdaptError(f"a classifier needs at least two classes, got {list(classes)}")
        self.classes = tuple(classes)
        self.head = _fresh_head(feature_width(self.backbone), len(classes))
        self.metrics = nn.ModuleDict(
            {part: class_metrics(part, len(classes)) for part in ("val", "test")}
        )
        self.adapters.extra = {
            "task": TASK,
            "backbone": self.spec.to_json(),
            "preprocessing": self.preprocessing.to_json(),
            "classes": list(classes),
        }

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images))
        return logits

    def _logits(self, batch: Batch) -> Tensor:
        images, _, *numbers = batch
        if self._cache is None or not numbers:
            logits: Tensor = self(images)
        else:
            logits = self.head(self._cache(images, numbers[0]))
        return logits

    def training_loss(self, batch: Batch) -> Tensor:
        logits, labels = self._logits(batch), batch[1]
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if self.consistency > 0:
            loss = loss + self.consistency * symmetric_kl(logits, self._logits(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._measure("test", batch)

    def _measure(self, part: str, batch: Batch) -> Tensor:
        """Log a batch's metrics; its predicted classes are returned for the confusion matrix."""
        logits, labels = self._logits(batch), batch[1]
        metrics = self.metrics[part]
        assert isinstance(metrics, MetricCollection)
        metrics.update(logits.softmax(-1), labels)
        loss, size = F.cross_entropy(logits, labels), len(labels)
        self.log(f"{part}_loss", loss, batch_size=size, sync_dist=True)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=size)
        predicted: Tensor = logits.argmax(-1)
        return predicted


def _fresh_head(width: int, classes: int) -> nn.Linear:
    """W uniform in +-1 / sqrt(width), b = 0, drawn from the run's seed.

    Not from the running state of torch's generator: with one seed, every method of a comparison
    starts with the same head, however many numbers its adapters drew.
    """
    own = Generator().manual_seed(torch.initial_seed())
    head = nn.Linear(width, classes, dtype=torch.float32)
    with torch.no_grad():
        head.weight.uniform_(-(width**-0.5), width**-0.5, generator=own)
        head.bias.zero_()
    return head
