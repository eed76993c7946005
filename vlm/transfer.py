"""`polyadapt vlm transfer`: what trained sets do on classes and on data that they have not seen.

Without --to: base-to-new generalisation. Sets are trained on K shots of the first half of the
classes of --data and tested on either half, each among its own classes. With --to: cross-data-set
transfer. Sets are trained on K shots of all classes of --data and tested on the others as well.
Both are CoCoOp's protocols (arXiv 2203.05557), with the training of `few-shot`, whose finished runs
in --out count. Runs that are finished are not repeated.
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
from .data_words import Where, data_called
from .few_shot_run import Comparison, Run
from .few_shot_words import add_arguments, comparison_of
from .methods import ADAPTERS, ZERO_SHOT, Method, methods_called
from .prompts import TEMPLATES
from .records import Record
from .transfer_report import AVERAGE, HARMONIC, Summary, table
from .transfer_run import Elsewhere, Target

FILES = ("transfer.csv", "transfer.md")
DEFAULT = f"{ZERO_SHOT},clip-lora,block-lora"


def main(argv: list[str]) -> int:
    """Run what is not finished, then print and write a table and a CSV file."""
    asked = _parser().parse_args(argv)
    data = data_called(asked.data, asked.root)
    others = [data_called(word, asked.root) for word in asked.to]
    shared = comparison_of(asked, data if others else data.part("base"))
    own = TEMPLATES if asked.own_templates else {}
    targets = [
        Target(other, own.get(other.title, shared.template))
        for other in others or [data.part("new")]
    ]
    methods = methods_called(asked.methods)
    if fixed := [m.name for m in methods if m.learns and not m.words]:
        raise AdaptError(
            f"{fixed[0]} answers only the classes that it was trained on: leave it out"
        )
    summary = AVERAGE if others else HARMONIC
    with calm():
        compare(shared, methods, asked.shots, asked.seeds, targets, asked.out, summary)
    return 0


def compare(
    shared: Comparison,
    methods: Sequence[Method],
    shots: int,
    seeds: Sequence[int],
    targets: Sequence[Target],
    out: Path,
    summary: Summary = AVERAGE,
) -> list[Record]:
    """Every method with every seed, on the data of `shared` and on all targets.

    The files of `FILES` go to `out`. Raises `AdaptError` before any run for two data of one name,
    for data without a test part or with other flaws, and for a record of other settings.
    """
    _require_different([shared.where, *(target.where for target in targets)])
    learning = [Run(shared, m, shots, s, out) for s in seeds for m in methods if m.learns]
    runs = [Run(shared, m, shots, seeds[0], out) for m in methods if not m.learns] + learning
    done = [_finished(run, targets) for run in runs]
    print(f"{len(runs)} runs, {sum(map(all, done))} of them finished before", flush=True)
    if not all(map(all, done)):
        for target in (Target(shared.where, shared.template), *targets):
            target.require(shared.frozen.pair)
    make_folder(out)
    records = [r for run, found in zip(runs, done, strict=True) for r in _run(run, targets, found)]
    shown = table(records, summary)
    for name, content in zip(FILES, (records_csv(records), shown.encode()), strict=True):
        write_atomically(out / name, content)
    print(f"\n{shown}\n" + "\n".join(str(out / name) for name in FILES))
    return records


def _finished(run: Run, targets: Sequence[Target]) -> list[Record | None]:
    elsewhere = Elsewhere(run)
    return [run.finished(), *(elsewhere.finished(target) for target in targets)]


def _run(run: Run, targets: Sequence[Target], found: Sequence[Record | None]) -> list[Record]:
    """The run's own record and one for each target; what is missing is made."""
    own, *others = found
    own = own or run.record()
    elsewhere = Elsewhere(run)
    pairs = zip(targets, others, strict=True)
    records = [own, *(other or elsewhere.record(target, own) for target, other in pairs)]
    if not all(found):
        told = ", ".join(f"{record.data} {record.top1:.1%}" for record in records)
        print(f"{run.folder.name}: {told}", flush=True)
    return records


def _require_different(places: Sequence[Where]) -> None:
    titles = [where.title for where in places]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise AdaptError(f"two data sets are called {twice[0]!r}: their results have one name")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="polyadapt vlm transfer", description=__doc__)
    add_arguments(parser)
    add = parser.add_argument
    add(
        "--to",
        nargs="+",
        default=[],
        metavar="NAME|NPZ|FOLDER",
        help="other data to be tested on; without it: the other half of the classes",
    )
    add("--shots", type=_from_one, default=16, metavar="N", help="default: 16")
    add(
        "--methods",
        default=DEFAULT,
        metavar="A,B,...",
        help=f"of {ZERO_SHOT}, {', '.join(ADAPTERS)} and configurations FILE.yaml; default:"
        f" {DEFAULT}",
    )
    add(
        "--own-templates",
        action="store_true",
        help="ask every data set of --to that has a NAME with the template that it has of its own",
    )
    return parser


def _from_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
