"""`polyadapt timeseries compare`: One-for-All and its baselines by horizon and seed, side by side.

One protocol for all: the same windows, Adam, the epoch that is best on the development windows, and
then all test windows once; errors are means over items in units of the scaled channels. Runs that
are finished are not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.cli import OneLineParser
from ..core.container import write_atomically
from ..core.errors import AdaptError
from ..core.records import records_csv
from ..core.run_folder import make_folder
from .backbone_words import HELP, backbone_called
from .methods import METHODS, Method, method_called

if TYPE_CHECKING:
    from .compare_run import Comparison, Record

FILES = ("outcomes.csv", "table.md", "comparison.png")
_NAMED = {  # how the benchmarks' files are called
    "weather": "Weather",
    "electricity": "Electricity",
    "traffic": "Traffic",
    "national_illness": "ILI",
    "exchange_rate": "Exchange",
}


def main(argv: list[str]) -> int:
    """Run what is not finished, then print and write a table, a CSV file and a picture."""
    asked = _parser().parse_args(argv)
    methods = [method_called(word) for word in asked.methods.split(",")]
    names = [method.name for method in methods]
    if twice := [name for name in names if names.count(name) > 1]:
        raise AdaptError(f"the method {twice[0]!r} is named twice")
    compare(shared_of(asked), methods, asked.horizons, asked.seeds, asked.out, asked.published)
    return 0


def compare(
    shared: Comparison,
    methods: Sequence[Method],
    horizons: Sequence[int],
    seeds: Sequence[int],
    out: Path,
    published: bool = False,
) -> list[Record]:
    """Every method at every horizon with every seed; the files of `FILES` go to `out`.

    `published`: rows of the papers below ours, where the data are a benchmark that we know them of.
    Raises `AdaptError` before any run for a horizon below 1 or without a window, for a method that
    cannot be built, and for a record of other settings.
    """
    from .compare_report import picture, table
    from .compare_run import Run

    if min(horizons) < 1:
        raise AdaptError(f"horizons={min(horizons)} is not allowed: whole numbers from 1")
    runs = [
        Run(shared, method, horizon, seed, out)
        for horizon in horizons
        for method in methods
        for seed in (seeds if method.learns else seeds[:1])
    ]
    done = [run.finished() for run in runs]
    if None in done:
        period = shared.require_windows(max(horizons)).period
    for run, found in zip(runs, done, strict=True):
        if found is None and run.horizon == min(horizons) and run.seed == seeds[0]:
            run.require_model(period)
    print(f"{len(runs)} runs, {len(runs) - done.count(None)} of them finished before", flush=True)
    make_folder(out)
    records = []
    for run, found in zip(runs, done, strict=True):
        records.append(found or run.record())
        if found is None:
            print(f"{run.folder.name}: {_line(records[-1])}", flush=True)
    shown = table(records, published)
    contents = (records_csv(records), shown.encode(), picture(records, published))
    for name, content in zip(FILES, contents, strict=True):
        write_atomically(out / name, content)
    print(f"\n{shown}\n" + "\n".join(str(out / name) for name in FILES))
    return records


def shared_of(asked: argparse.Namespace) -> Comparison:
    """What the options say that is the same for all runs."""
    from .adapters import PUBLISHED
    from .compare_run import Comparison
    from .protocol import Protocol

    kind, data = _source(asked.data, asked.time)
    recipe = PUBLISHED[asked.recipe](asked.rank)
    patches = {"length": asked.patch, "stride": asked.stride}
    return Comparison(
        path=Path(asked.data),
        kind=kind,
        data=data,
        look_back=asked.look_back,
        backbone=backbone_called(asked.backbone, asked.blocks),
        patches=replace(recipe.patches, **{k: v for k, v in patches.items() if v is not None}),
        adapter=recipe.recipe,
        protocol=Protocol(
            epochs=asked.epochs,
            patience=asked.patience,
            batch_size=asked.batch_size,
            windows_per_epoch=asked.windows_per_epoch,
            every=asked.every,
            few=asked.few,
        ),
    )


def _source(path: str, time: str | None) -> tuple[str, Any]:
    """The kind of data, and what makes a module of it: a benchmark by its file's name, a table."""
    from .data import ETT, Benchmark, TableData

    stem = Path(path).stem
    if time is None and stem in ("ETTh1", "ETTh2", "ETTm1", "ETTm2"):
        return "ETT", partial(ETT, path)
    if time is None and stem.lower() in _NAMED:
        name = _NAMED[stem.lower()]
        return name, partial(Benchmark, name, path)
    return f"table, time={time}", partial(TableData, path, time)


def _line(record: Record) -> str:
    spent = record.fit_seconds + record.test_seconds
    return f"MSE {record.mse:.4f}, MAE {record.mae:.4f}, {spent:.0f} s"


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="polyadapt timeseries compare", description=__doc__)
    add = parser.add_argument
    about = "a benchmark's file under its usual name (ETTh1.csv, weather.csv, ...), or any table"
    add("--data", required=True, metavar="FILE", help=about)
    add("--time", metavar="COLUMN", help="of a table's times; it is then cut 70 : 10 : 20")
    add("--out", type=Path, required=True, metavar="FOLDER", help="of the runs and the result")
    add("--horizons", type=_numbers_of, default=[96], metavar="96,192,...")
    add("--seeds", type=_numbers_of, default=[0, 1, 2], metavar="0,1,...")
    add("--methods", default=",".join(METHODS), metavar="A,B:RATE,...", help=_about_methods())
    add("--look-back", type=int, default=336, metavar="L", help="default: 336")
    add("--backbone", default="minilm", metavar="WORD", help=f"{HELP}; default: minilm")
    add("--blocks", type=int, metavar="N", help="of the language model; default: 6")
    add("--patch", type=int, metavar="P", help="rows of a patch; default: the recipe's")
    add("--stride", type=int, metavar="S", help="between patches; default: the recipe's")
    add("--recipe", choices=("code", "paper"), default="code", help="One-for-All's; default: code")
    add("--rank", type=int, default=16, metavar="R", help="of its adapters; default: 16")
    add("--epochs", type=int, default=10, metavar="N", help="at most; default: 10")
    add("--patience", type=int, default=3, metavar="N", help="epochs without a better one")
    add("--batch-size", type=int, default=256, metavar="N", help="windows; default: 256")
    add("--windows-per-epoch", type=int, metavar="N", help="drawn once by the seed; default: all")
    add("--every", type=int, default=1, metavar="N", help="develop on every N-th window; default 1")
    add("--few", type=float, default=1.0, metavar="SHARE", help="of training rows, the earliest")
    add("--published", action="store_true", help="rows of the papers beside ours, marked")
    return parser


def _about_methods() -> str:
    return f"of {', '.join(METHODS)}; default: all"


def _numbers_of(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of different whole numbers such as 96,192"
        )
    return [int(word) for word in words]
