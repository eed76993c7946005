"""What the configurations of the vision domain are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from ..core.configuration import Domain
from ..core.images.data import ImageData
from ..core.images.measured import TEST_PICTURE, TEST_TABLE, Measured
from .backbones import Backbone
from .frozen_prefix import require_fixed_images
from .predict import describe
from .task import ImageClassification


def _backbone_of(set_file: str | Path) -> Backbone:
    return describe(set_file).backbone


def _check(task: Any, data: ImageData, trainer: Trainer) -> None:
    if task.cache_prefix != "none":
        require_fixed_images(data, trainer)


DOMAIN = Domain(
    name="vision",
    things="images",
    task=ImageClassification,
    data=ImageData,
    backbone=Backbone,
    subclasses=[Backbone],
    backbone_of=_backbone_of,
    measured=Measured,
    test_files=[TEST_TABLE, TEST_PICTURE],
    next_words="predict --set {adapter} IMAGE ...",
    check=_check,
)
