"""The words that `few-shot` and `transfer` share: data, backbone, seeds, protocol."""

from __future__ import annotations

import argparse
from pathlib import Path

from .backbone_words import HELP, backbone_called
from .data_words import Where
from .few_shot_run import Comparison
from .prompts import COMMON, template_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything but shots and methods."""
    add = parser.add_argument
    add("--data", required=True, metavar="NAME|NPZ|FOLDER", help="what is to be classified")
    add("--root", default="data", metavar="FOLDER", help="where data sets with a NAME lie")
    add("--backbone", default="offline", metavar="WORD", help=f"{HELP}; default: offline")
    add("--out", type=Path, required=True, metavar="FOLDER", help="of the runs and the result")
    add("--seeds", type=numbers_of, default=[1, 2, 3], metavar="1,2,...")
    add("--template", default=COMMON, help="one sentence with {}, or a data set's name")
    add("--steps-per-shot", type=int, default=500, metavar="N", help="default: 500")
    add("--batch-size", type=int, default=32, metavar="N", help="default: 32")
    add("--text-chunk", type=int, metavar="N", help="prompts at a time, for less memory")


def comparison_of(asked: argparse.Namespace, where: Where, views: int = 10) -> Comparison:
    """What the words say that all methods share."""
    return Comparison(
        backbone=backbone_called(asked.backbone),
        where=where,
        template=template_of(asked.template),
        steps_per_shot=asked.steps_per_shot,
        batch_size=asked.batch_size,
        views=views,
        text_chunk=asked.text_chunk,
    )


def numbers_of(text: str) -> list[int]:
    """Whole numbers, as an argument's type.

    >>> numbers_of("1,4,16")
    [1, 4, 16]
    """
    words = text.split(",")
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of different whole numbers such as 1,4,16"
        )
    return [int(word) for word in words]
