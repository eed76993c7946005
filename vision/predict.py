"""Use an adapter file: rebuild its backbone, attach the set and classify image files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.cli import OneLineParser
from ..core.errors import AdaptError, StoreError
from ..core.images.classifying import Answers, Prediction, add_arguments, image_files, run
from ..core.images.preprocessing import Preprocessing
from ..core.store import load, read_file
from .backbones import Backbone

TASK = "image classification"


@dataclass(frozen=True)
class Description:
    """What a classifier's adapter file says besides its adapters."""

    backbone: Backbone
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    weight: Tensor
    bias: Tensor


class Classifier:
    """An adapter file in use: images [n, c, h, w], prepared, -> probabilities [n, classes].

    Raises `StoreError` for a file that is missing, damaged or holds no image classifier.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        self.about = describe(path)
        self.backbone = self.about.backbone.build().eval()
        load(self.backbone, path)
        self.device = torch.device(device)
        self.backbone.to(self.device)
        self.weight, self.bias = (t.to(self.device) for t in (self.about.weight, self.about.bias))

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, classes]."""
        features = self.backbone(images.to(self.device))
        return F.linear(features, self.weight, self.bias).softmax(-1)

    def classify(
        self, paths: Sequence[Path], batch_size: int = 32, skip: bool = False
    ) -> Iterator[Prediction | AdaptError]:
        """A prediction for each image, in order; with `skip`, the error of an unreadable one."""
        return self.answers.classify(paths, batch_size, skip)

    @property
    def answers(self) -> Answers:
        """What the command that prints predictions takes."""
        return Answers(self.probabilities, self.about.classes, self.about.preprocessing)


def describe(path: str | Path) -> Description:
    """Read what a classifier's adapter file says besides its adapters."""
    file = read_file(path)
    if file.extra.get("task") != TASK:
        raise StoreError(f"{path} holds no image classifier: task {file.extra.get('task')!r}")
    try:
        found = Description(
            backbone=Backbone.from_json(file.extra["backbone"]),
            preprocessing=Preprocessing.from_json(file.extra["preprocessing"]),
            classes=tuple(map(str, file.extra["classes"])),
            weight=file.head["head.weight"],
            bias=file.head["head.bias"],
        )
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path} lacks or misstates {error} of an image classifier") from error
    if found.bias.shape != (len(found.classes),):
        raise StoreError(f"{path}: {len(found.classes)} class names, head {list(found.bias.shape)}")
    return found


def main(argv: list[str]) -> int:
    """`polyadapt vision predict`: print path, class and probability of every image."""
    asked = _parser().parse_args(argv)
    paths = image_files(asked.images)
    classifier = Classifier(asked.set, "cuda" if torch.cuda.is_available() else "cpu")
    return run(asked, paths, classifier.answers)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt vision predict",
        description="Classify images with an adapter file; it names its backbone and its classes.",
    )
    add_arguments(parser)
    parser.add_argument("--set", type=Path, required=True, metavar="FILE", help="the adapter file")
    return parser
