"""`polyadapt vlm zero-shot`: classify images into classes that are named on the spot."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core.cli import OneLineParser
from ..core.errors import AdaptError
from ..core.images.classifying import add_arguments, image_files, run
from .backbone_words import HELP, backbone_called
from .description import describe
from .predict import Classifier, device
from .prompts import COMMON, class_prompts

_DEFAULT = "ViT-B-16-quickgelu/openai"


def main(argv: list[str]) -> int:
    """Print path, class and probability of every image."""
    asked = _parser().parse_args(argv)
    labels = _labels(asked.labels, asked.labels_file)
    for template in asked.template or (COMMON,):
        class_prompts(labels, template)  # before a model is fetched
    paths = image_files(asked.images)
    return run(asked, paths, _classifier(asked, labels).answers)


def _classifier(asked: argparse.Namespace, labels: list[str]) -> Classifier:
    if asked.set is None:
        spec = backbone_called(asked.backbone or _DEFAULT)
        pair = spec.image_text(spec.build().eval().to(device()))
        return Classifier(pair, labels, asked.template or (COMMON,))
    made_on = describe(asked.set).backbone
    if asked.backbone is not None and backbone_called(asked.backbone) != made_on:
        raise AdaptError(f"{asked.set} was made on {made_on}, not on {asked.backbone}")
    return Classifier.from_file(asked.set, device(), labels, asked.template)


def _labels(said: str | None, file: Path | None) -> list[str]:
    """The names between commas, or the lines of a file that are not empty."""
    if (said is None) == (file is None):
        raise AdaptError("name the classes: either --labels cat,dog or --labels-file FILE")
    if said is not None:
        return [name.strip() for name in said.split(",")]
    assert file is not None, "one of the two is given"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AdaptError(f"cannot read the classes in {file}: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt vlm zero-shot",
        description="Classify images into classes that you name, with a model as it is or adapted.",
    )
    add_arguments(parser)
    add = parser.add_argument
    add("--labels", metavar="A,B,...", help="the classes; `_` stands for a space")
    add("--labels-file", type=Path, metavar="FILE", help="the classes, one in a line")
    add("--backbone", metavar="WORD", help=f"{HELP}; default: {_DEFAULT}")
    add("--set", type=Path, metavar="FILE", help="an adapter file: it names its backbone")
    add(
        "--template",
        action="append",
        metavar="TEXT",
        help=f"a sentence with one {{}}, or a data set's name (oxford_pets); given several times,"
        f" their features are averaged; default: the set's, else '{COMMON}'",
    )
    return parser
