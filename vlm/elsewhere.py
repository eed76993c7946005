"""What a trained set does elsewhere: on classes, and on data sets, that it has not seen.

Sets have no head, so prompts of any classes make a classifier of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import harmonic_mean, mean

import torch

from ..core.images.data import ImageData
from .halves import HalfOfClasses
from .predict import Classifier, device

AVERAGE = "average"


@dataclass(frozen=True)
class BaseToNew:
    """Top-1 on the base classes and on the new ones, each among its own half."""

    base: float
    new: float

    @property
    def harmonic(self) -> float:
        """2 base new / (base + new).

        >>> round(BaseToNew(0.8, 0.6).harmonic, 4)
        0.6857
        """
        return harmonic_mean([self.base, self.new])


def top1(classifier: Classifier, data: ImageData, batch_size: int = 64) -> float:
    """The share of the test images of `data`, which is set up, that get their class.

    Raises `AdaptError` for data without a test part.
    """
    data.preprocessing = classifier.preprocessing
    data.batch_size = batch_size
    right = total = 0
    for images, labels in data.test_dataloader():
        named = classifier.probabilities(images).argmax(1).cpu()
        right += int(torch.eq(named, labels).sum())
        total += len(labels)
    return right / total


def top1_on(
    set_file: str | Path, data: ImageData, template: str | None = None, batch_size: int = 64
) -> float:
    """Top-1 on the test part of any data, in its own classes; `template` is the set's unless given.

    Raises `AdaptError` for a file that is no set of an image-text classifier and for data without a
    test part.
    """
    data.prepare_data()
    data.setup()
    templates = None if template is None else (template,)
    classifier = Classifier.from_file(set_file, device(), data.classes, templates)
    return top1(classifier, data, batch_size)


def base_to_new(set_file: str | Path, data: ImageData, template: str | None = None) -> BaseToNew:
    """What a set that was trained on the base half of `data` does on either half (2203.05557).

    Train it with `HalfOfClasses(data, "base", shots=K)`, or `CoOpData(..., half="base")`.
    """
    found = [top1_on(set_file, HalfOfClasses(data, half), template) for half in ("base", "new")]
    return BaseToNew(*found)


def cross_data_set(
    set_file: str | Path,
    targets: Mapping[str, ImageData],
    templates: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Top-1 of one set on every target by its name, and their average.

    CoCoOp's protocol (arXiv 2203.05557) trains on 16 shots of ImageNet and tests on the other ten.
    `templates`: of targets that have one of their own, as `prompts.TEMPLATES` has them.
    """
    said = templates or {}
    found = {name: top1_on(set_file, data, said.get(name)) for name, data in targets.items()}
    return found | {AVERAGE: mean(found.values())}
