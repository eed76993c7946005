"""`polyadapt vlm few-shot`: methods, numbers of shots and seeds on one data set, side by side.

The protocol is CLIP-LoRA's (arXiv 2405.18541): K images per class drawn by the seed, no validation
images, one set of settings for all data sets, STEPS x K optimiser steps of 32 images seen as random
resized crops, one template, top-1 on the whole test part. Runs that are finished are not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.cli import OneLineParser
from ..core.container import write_atomically
from ..core.errors import AdaptError
from ..core.images.data import ArrayData, ImageFolders
from ..core.records import records_csv
from ..core.run_folder import make_folder
from .backbone_words import HELP, backbone_called
from .data_sets import DATA_SETS, CoOpData
from .few_shot_run import Comparison, Run
from .methods import ADAPTERS, BASELINES, DEFAULT, Method, method_called
from .prompts import COMMON, template_of
from .records import Record

FILES = ("outcomes.csv", "table.md", "few_shot.png")


def main(argv: list[str]) -> int:
    """Run what is not finished, then print and write a table, a CSV file and a picture."""
    asked = _parser().parse_args(argv)
    shared = Comparison(
        backbone=backbone_called(asked.backbone),
        **_source(asked.data, asked.root),
        template=template_of(asked.template),
        steps_per_shot=asked.steps_per_shot,
        batch_size=asked.batch_size,
        views=asked.views,
        text_chunk=asked.text_chunk,
    )
    methods = [method_called(word) for word in asked.methods.split(",")]
    names = [method.name for method in methods]
    if twice := [name for name in names if names.count(name) > 1]:
        raise AdaptError(f"two methods are called {twice[0]!r}")
    compare(shared, methods, asked.shots, asked.seeds, asked.out)
    return 0


def compare(
    shared: Comparison,
    methods: Sequence[Method],
    shots: Sequence[int],
    seeds: Sequence[int],
    out: Path,
) -> list[Record]:
    """Every method with every number of shots and every seed; the files of `FILES` go to `out`.

    Raises `AdaptError` before any run for shots below 1 and for a record of other settings.
    """
    from .few_shot_report import picture, table

    if min(shots) < 1:
        raise AdaptError(f"shots={min(shots)} is not allowed: whole numbers from 1")
    runs = [Run(shared, m, k, s, out) for k in shots for s in seeds for m in methods if m.learns]
    fixed = [Run(shared, m, shots[0], seeds[0], out) for m in methods if not m.learns]
    runs = fixed + runs
    done = [run.finished() for run in runs]
    print(f"{len(runs)} runs, {len(runs) - done.count(None)} of them finished before", flush=True)
    make_folder(out)
    records = []
    for run, found in zip(runs, done, strict=True):
        records.append(found or run.record())
        if found is None:
            told = f"{records[-1].top1:.1%}, {records[-1].seconds:.0f} s"
            print(f"{run.folder.name}: {told}", flush=True)
    shown = table(records)
    contents = (records_csv(records), shown.encode(), picture(records))
    for name, content in zip(FILES, contents, strict=True):
        write_atomically(out / name, content)
    print(f"\n{shown}\n" + "\n".join(str(out / name) for name in FILES))
    return records


def _source(data: str, root: str) -> dict[str, Any]:
    """The data module and where its images are: a name, a file of arrays, a folder."""
    if data in DATA_SETS:
        return {"kind": CoOpData, "source": {"name": data, "root": root}}
    if data.endswith(".npz"):
        return {"kind": ArrayData, "source": {"path": data}}
    if Path(data).is_dir():
        return {"kind": ImageFolders, "source": {"root": data}}
    raise AdaptError(
        f"there is no data {data!r}: a file .npz, a folder of images, or one of"
        f" {', '.join(DATA_SETS)} with --root"
    )


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="polyadapt vlm few-shot", description=__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="NAME|NPZ|FOLDER", help="what is to be classified")
    add("--root", default="data", metavar="FOLDER", help="where data sets with a NAME lie")
    add("--backbone", default="offline", metavar="WORD", help=f"{HELP}; default: offline")
    add("--out", type=Path, required=True, metavar="FOLDER", help="of the runs and the result")
    add("--shots", type=_numbers_of, default=[1, 4, 16], metavar="1,4,...")
    add("--seeds", type=_numbers_of, default=[1, 2, 3], metavar="1,2,...")
    known = ", ".join((*BASELINES, *ADAPTERS))
    add(
        "--methods",
        default=",".join(DEFAULT),
        metavar="A,B,...",
        help=f"of {known} and configurations FILE.yaml; default: {','.join(DEFAULT)}",
    )
    add("--template", default=COMMON, help="one sentence with {}, or a data set's name")
    add("--steps-per-shot", type=int, default=500, metavar="N", help="default: 500")
    add("--batch-size", type=int, default=32, metavar="N", help="default: 32")
    add("--views", type=int, default=10, metavar="N", help="of an image, for Tip-Adapter's keys")
    add("--text-chunk", type=int, metavar="N", help="prompts at a time, for less memory")
    return parser


def _numbers_of(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of different whole numbers such as 1,4,16"
        )
    return [int(word) for word in words]
