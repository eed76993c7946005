"""Image files in, their classes out: what every domain's command for it shares."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..container import write_atomically
from ..errors import AdaptError
from .preprocessing import Preprocessing, open_image
from .sources import images_in


@dataclass(frozen=True)
class Prediction:
    """The likeliest class of an image and its probability."""

    path: Path
    label: str
    probability: float


@dataclass(frozen=True)
class Answers:
    """A classifier: images [n, c, h, w], prepared as it wants -> probabilities [n, classes]."""

    probabilities: Callable[[Tensor], Tensor]
    classes: Sequence[str]
    wants: Preprocessing

    def classify(
        self, paths: Sequence[Path], batch_size: int = 32, skip: bool = False
    ) -> Iterator[Prediction | AdaptError]:
        """A prediction for each image, in order; with `skip`, the error of an unreadable one."""
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            read = [_prepared(path, self.wants, skip) for path in batch]
            good = [image for image in read if isinstance(image, Tensor)]
            found = iter(self.probabilities(torch.stack(good)).cpu() if good else ())
            for path, image in zip(batch, read, strict=True):
                if isinstance(image, AdaptError):
                    yield image
                else:
                    probability, label = next(found).max(-1)
                    yield Prediction(path, self.classes[int(label)], float(probability))


def _prepared(path: Path, wants: Preprocessing, skip: bool) -> Tensor | AdaptError:
    try:
        return wants(open_image(path))
    except AdaptError as error:
        if skip:
            return error
        raise


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words that say which images, how they are read and where the table goes."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files or folders")
    parser.add_argument("--out", type=Path, metavar="CSV", help="also write the table to a file")
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave out images that cannot be read"
    )
    parser.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="default: 32")


def run(asked: argparse.Namespace, paths: Sequence[Path], answers: Answers) -> int:
    """Print path, class and probability of every image, as the words asked."""
    found: list[Prediction] = []
    for result in answers.classify(paths, asked.batch_size, asked.skip_unreadable):
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
