"""What the configurations of the vision domain are made of."""

from __future__ import annotations

from collections.abc import Sequence
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
from .which_task import is_segmentation


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


def domain_of(verb: str, words: Sequence[str]) -> Domain:
    """Image classification, or segmentation where the data are pictures with masks."""
    if not is_segmentation(verb, words):
        return DOMAIN
    from .medical.configuration import DOMAIN as SEGMENTATION

    return SEGMENTATION
