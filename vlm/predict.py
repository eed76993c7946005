"""Classify image files by prompts: with an adapter file, or with a model as it is."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ..core.cli import OneLineParser
from ..core.errors import AdaptError
from ..core.images.classifying import Answers, Prediction, add_arguments, image_files, run
from ..core.images.preprocessing import Preprocessing
from .adapters import load_set
from .description import describe
from .model import ImageText
from .prompts import COMMON, class_tokens
from .text_features import TextFeatures, averaged

_AT_ONCE = 256  # prompts; nothing is kept for backward, so that it is only the memory of one block


class Classifier:
    """Images [n, 3, h, w], prepared -> softmax(scale f(image) g(class)^T) [n, classes].

    g averages over the `templates`. The sets that are active in a call act on both towers; no head,
    so that `classes` may be any. `scale` is the checkpoint's unless given.

    >>> from polyadapt.vlm.backbones import OpenCLIP
    >>> small = OpenCLIP(name="ViT-S-32-alt", pretrained=None)
    >>> pets = Classifier(small.image_text(small.build()), ["cat", "dog"])
    >>> pets.probabilities(torch.zeros(1, 3, 224, 224)).shape
    torch.Size([1, 2])
    """

    def __init__(
        self,
        pair: ImageText,
        classes: Sequence[str],
        templates: Sequence[str] = (COMMON,),
        scale: float | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        self.pair = pair
        self.classes = tuple(classes)
        self.scale = pair.scale if scale is None else scale
        self.preprocessing = preprocessing or pair.preprocessing
        if not templates:
            raise AdaptError("no template is given: one or more are wanted")
        tokens = [class_tokens(pair.tokenize, self.classes, template) for template in templates]
        self.texts = [TextFeatures(pair, each, _AT_ONCE) for each in tokens]

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        classes: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
    ) -> Self:
        """An adapter file in use, with its own classes and template unless others are given.

        Raises `StoreError` for a file that is missing, damaged or holds no such classifier.
        """
        about = describe(path)
        model = about.backbone.build().eval()
        load_set(model, path)
        pair = about.backbone.image_text(model.to(device))
        asked = (classes or about.classes, templates or (about.template,))
        return cls(pair, *asked, about.scale, about.preprocessing)

    def naming(self, classes: Sequence[str], templates: Sequence[str]) -> Classifier:
        """The same model and the sets on it, asked about other classes."""
        return Classifier(self.pair, classes, templates, self.scale, self.preprocessing)

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """[n, 3, h, w] -> [n, classes]."""
        texts = averaged([found() for found in self.texts])
        return (self.scale * self.pair.image_features(images) @ texts.T).softmax(-1)

    def classify(
        self, paths: Sequence[Path], batch_size: int = 32, skip: bool = False
    ) -> Iterator[Prediction | AdaptError]:
        """A prediction for each image, in order; with `skip`, the error of an unreadable one."""
        return self.answers.classify(paths, batch_size, skip)

    @property
    def answers(self) -> Answers:
        """What the commands that print predictions take."""
        return Answers(self.probabilities, self.classes, self.preprocessing)


def device() -> str:
    """Where the commands compute."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def main(argv: list[str]) -> int:
    """`polyadapt vlm predict`: print path, class and probability of every image."""
    asked = _parser().parse_args(argv)
    paths = image_files(asked.images)
    return run(asked, paths, Classifier.from_file(asked.set, device()).answers)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt vlm predict",
        description="Classify images with an adapter file; it names its backbone and its classes.",
    )
    add_arguments(parser)
    parser.add_argument("--set", type=Path, required=True, metavar="FILE", help="the adapter file")
    return parser
