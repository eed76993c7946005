"""Use an adapter file: rebuild its backbone, attach the set and classify image files."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.cli import OneLineParser
from ..core.container import write_atomically
from ..core.errors import AdaptError, StoreError
from ..core.images.preprocessing import Preprocessing, open_image
from ..core.images.sources import images_in
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


@dataclass(frozen=True)
class Prediction:
    """The likeliest class of an image and its probability."""

    path: Path
    label: str
    probability: float


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
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            read = [_prepared(path, self.about.preprocessing, skip) for path in batch]
            good = [image for image in read if isinstance(image, Tensor)]
            found = iter(self.probabilities(torch.stack(good)).cpu() if good else ())
            for path, image in zip(batch, read, strict=True):
                if isinstance(image, AdaptError):
                    yield image
                else:
                    probability, label = next(found).max(-1)
                    yield Prediction(path, self.about.classes[int(label)], float(probability))


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


def image_files(names: Sequence[Path]) -> list[Path]:
    """The files themselves, and all images in the folders among them."""
    found = []
    for name in names:
        inside = images_in(name) if name.is_dir() else [name]
        if not inside:
            raise AdaptError(f"the folder {name} holds no image")
        found += inside
    return found


def table(predictions: Sequence[Prediction]) -> bytes:
    """Predictions as CSV: path, class, probability."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "class", "probability"))
    writer.writerows((p.path, p.label, f"{p.probability:.6f}") for p in predictions)
    return text.getvalue().encode()


def _prepared(path: Path, wants: Preprocessing, skip: bool) -> Tensor | AdaptError:
    try:
        return wants(open_image(path))
    except AdaptError as error:
        if skip:
            return error
        raise


def main(argv: list[str]) -> int:
    """`polyadapt vision predict`: print path, class and probability of every image."""
    asked = _parser().parse_args(argv)
    paths = image_files(asked.images)
    classifier = Classifier(asked.set, "cuda" if torch.cuda.is_available() else "cpu")
    found: list[Prediction] = []
    for result in classifier.classify(paths, asked.batch_size, asked.skip_unreadable):
        if isinstance(result, AdaptError):
            print(f"polyadapt: skipped: {result}", file=sys.stderr)
        else:
            found.append(result)
            print(f"{result.path}\t{result.label}\t{result.probability:.4f}", flush=True)
    if not found:
        raise AdaptError(f"none of {len(paths)} images can be read")
    if len(found) < len(paths):
        print(f"polyadapt: skipped {len(paths) - len(found)} of {len(paths)}", file=sys.stderr)
    if asked.out is not None:
        write_atomically(asked.out, table(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt vision predict",
        description="Classify images with an adapter file; it names its backbone and its classes.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files or folders")
    parser.add_argument("--set", type=Path, required=True, metavar="FILE", help="the adapter file")
    parser.add_argument("--out", type=Path, metavar="CSV", help="also write the table to a file")
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave out images that cannot be read"
    )
    parser.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="default: 32")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
