"""`polyadapt vlm few-shot`: methods, numbers of shots and seeds on one data set, side by side.

The protocol is CLIP-LoRA's (arXiv 2405.18541): K images per class drawn by the seed, no validation
images, one set of settings for all data sets, STEPS x K optimiser steps of 32 images seen as random
resized crops, one template, top-1 on the whole test part. Runs that are finished are not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..core.cli import OneLineParser
from ..core.container import write_atomically
from ..core.errors import AdaptError
from ..core.fitting import calm
from ..core.records import records_csv
from ..core.run_folder import make_folder
from .data_words import data_called
from .few_shot_run import Comparison, Run
from .few_shot_words import add_arguments, comparison_of, numbers_of
from .methods import ADAPTERS, BASELINES, DEFAULT, Method, methods_called
from .records import Record

FILES = ("outcomes.csv", "table.md", "few_shot.png")


def main(argv: list[str]) -> int:
    """Run what is not finished, then print and write a table, a CSV file and a picture."""
    asked = _parser().parse_args(argv)
    shared = comparison_of(asked, data_called(asked.data, asked.root), asked.views)
    with calm():
        compare(shared, methods_called(asked.methods), asked.shots, asked.seeds, asked.out)
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


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="polyadapt vlm few-shot", description=__doc__)
    add_arguments(parser)
    add = parser.add_argument
    add("--shots", type=numbers_of, default=[1, 4, 16], metavar="1,4,...")
    known = ", ".join((*BASELINES, *ADAPTERS))
    add(
        "--methods",
        default=",".join(DEFAULT),
        metavar="A,B,...",
        help=f"of {known} and configurations FILE.yaml; default: {','.join(DEFAULT)}",
    )
    add(
        "--views",
        type=int,
        default=10,
        metavar="N",
        help="of an image, for Tip-Adapter's keys; 0: as tests see it; default: 10",
    )
    return parser
