"""What the configurations of the image-text domain are made of."""

from __future__ import annotations

from pathlib import Path

from ..core.configuration import Domain
from ..core.images.data import ImageData
from ..core.images.measured import TEST_PICTURE, TEST_TABLE, Measured
from . import data_sets as data_sets  # its data module is found by its short name
from . import halves as halves
from .backbones import Backbone
from .description import describe
from .task import ImageTextClassification


def _backbone_of(set_file: str | Path) -> Backbone:
    return describe(set_file).backbone


DOMAIN = Domain(
    name="vlm",
    things="images and the names of their classes",
    task=ImageTextClassification,
    data=ImageData,
    backbone=Backbone,
    subclasses=[Backbone],
    backbone_of=_backbone_of,
    measured=Measured,
    test_files=[TEST_TABLE, TEST_PICTURE],
    next_words="predict --set {adapter} IMAGE ...",
)
