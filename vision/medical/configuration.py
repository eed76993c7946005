"""What the configurations of medical segmentation are made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.configuration import Domain
from .backbones import Backbone
from .data import SegmentationData
from .describe import describe
from .frozen_prefix import require_fixed_pictures
from .losses import Loss
from .measured import EVERY_OVERLAY, TEST_PICTURES, TEST_TABLE, Measured
from .task import Segmentation

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def _backbone_of(set_file: str | Path) -> Backbone:
    return describe(set_file).backbone


def _check(task: Any, data: SegmentationData, trainer: Trainer) -> None:
    if task.cache_prefix != "none":
        require_fixed_pictures(data, trainer)


DOMAIN = Domain(
    name="vision",
    things="pictures with masks",
    task=Segmentation,
    data=SegmentationData,
    backbone=Backbone,
    subclasses=[Backbone, Loss],
    backbone_of=_backbone_of,
    measured=Measured,
    test_files=[TEST_TABLE, TEST_PICTURES, EVERY_OVERLAY],
    chosen={"model.loss": Loss},
    check=_check,
    next_words="segment --set {adapter} --out masks IMAGE ...",
)
