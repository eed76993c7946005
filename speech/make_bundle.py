"""`polyadapt speech make-bundle`: sets, and the selector that chooses among them, in a folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.cli import OneLineParser
from ..core.container import write_atomically
from ..core.errors import AdaptError
from .bundle_record import check_name
from .decision import NONE, Costs
from .noise import CLEAN

if TYPE_CHECKING:
    from .bundle import Bundle
    from .equipment import Equipment, Making
    from .purpose import Purpose

CONFUSION, HEAT_MAP = "confusion.png", "wer.png"
_say = partial(print, flush=True)


def main(argv: list[str]) -> int:
    """Make a bundle, or take further sets into one; it is written when all is measured."""
    asked = _parser().parse_args(argv)
    files = _named(asked.add or asked.set)
    bundle = _widened(asked, files) if asked.add else _made(asked, files)
    assert bundle.decision is not None
    _say(f"\n{_table(bundle.decision.costs)}\n")
    for name in (CONFUSION, HEAT_MAP):
        _say(bundle.folder / name)
    _say(bundle.decision.advice())
    return 0


def _made(asked: argparse.Namespace, files: dict[str, Path]) -> Bundle:
    from .bundle import check_new, create
    from .purpose import purpose_of

    check_new(asked.folder, files, files)
    purposes = {name: purpose_of(file) for name, file in files.items()}
    labels = {name: purpose.scenario for name, purpose in purposes.items()}
    found = _equipment(asked, files, purposes, _making(asked))
    bundle = create(asked.folder, files, labels, found.selector, found.decision, found.hearing)
    _draw(bundle, found)
    return bundle


def _widened(asked: argparse.Namespace, added: dict[str, Path]) -> Bundle:
    """The other sets are not trained again; selector and cost matrix are made anew."""
    from .bundle import Bundle
    from .purpose import purpose_of

    bundle = Bundle.open(asked.folder)
    for name, cause in bundle.damaged.items():
        raise AdaptError(f"{asked.folder}: set {name!r} is damaged: {cause}")
    if twice := next((name for name in added if name in bundle.names), None):
        raise AdaptError(f"{asked.folder} has a set {twice!r} already: --add NAME=FILE renames it")
    new = {name: purpose_of(file) for name, file in added.items()}
    labels = {name: purpose.scenario for name, purpose in new.items()}
    purposes = {name: _known(bundle, name) for name in bundle.names} | new
    files = {name: bundle.file(name) for name in bundle.names} | added
    found = _equipment(asked, files, purposes, _making(asked, bundle))
    for name, file in added.items():
        bundle.add(file, labels[name], name)
    bundle.equip(found.selector, found.decision, found.hearing)
    _draw(bundle, found)
    return bundle


def _known(bundle: Bundle, name: str) -> Purpose:
    """By the set's own file, which knows more than the bundle's label, if it says it."""
    from ..core.store import read_file
    from .purpose import Purpose, purpose_of

    if "label" in read_file(bundle.file(name)).extra:
        return purpose_of(bundle.file(name))
    return Purpose.of_scenario(bundle.labels[name], bundle.record.hearing.convention)


def _making(asked: argparse.Namespace, bundle: Bundle | None = None) -> Making:
    """What was asked for; what was not is as it was in the bundle."""
    from .equipment import Making

    old = None if bundle is None else bundle.decision
    general, threshold = (NONE, 0.0) if old is None else (old.costs.general, old.threshold)
    return Making(
        general=general if asked.general is None else asked.general,
        noise_folder=asked.noise_folder,
        clean=asked.clean or (old is not None and CLEAN in old.classes),
        threshold=threshold if asked.threshold is None else asked.threshold,
        limit=asked.limit,
        steps=asked.steps,
        seconds=asked.seconds,
        batch=asked.batch,
        seed=asked.seed,
    )


def _equipment(
    asked: argparse.Namespace,
    files: dict[str, Path],
    purposes: dict[str, Purpose],
    how: Making,
) -> Equipment:
    from ..core.fitting import calm
    from .clip_settings import data_named
    from .equipment import equipment

    with calm():
        return equipment(files, purposes, data_named(asked.data), how, _say)


def _draw(bundle: Bundle, found: Equipment) -> None:
    from .pictures import confusion_matrix, wer_heat_map

    confused = confusion_matrix(
        found.measured.confusion, found.selector.classes, "Noise that the selector finds"
    )
    write_atomically(bundle.folder / CONFUSION, confused)
    costs = wer_heat_map(found.decision.costs, "WER by set and noise, validation")
    write_atomically(bundle.folder / HEAT_MAP, costs)


def _named(said: Sequence[str]) -> dict[str, Path]:
    """`NAME=FILE`, or `FILE`, whose name is then the set's."""
    found: dict[str, Path] = {}
    for text in said:
        name, equals, file = text.partition("=")
        if not equals or Path(text).exists():
            name, file = Path(text).stem, text
        if check_name(name) in found:
            raise AdaptError(f"two sets are called {name!r}: say --set NAME=FILE")
        found[name] = Path(file)
    return found


def _table(costs: Costs) -> str:
    """The cost matrix as text.

    >>> from .decision import Scenario
    >>> columns = (Scenario("music"), Scenario("babble"))
    >>> print(_table(Costs(("none", "quiet"), columns, ((50, 60), (12.5, 7)))))
    WER in %  music  babble
    none       50.0    60.0
    quiet      12.5     7.0
    """
    head = ["WER in %", *map(str, costs.scenarios)]
    rows = [
        [name, *(f"{wer:.1f}" for wer in wers)]
        for name, wers in zip(costs.sets, costs.wer, strict=True)
    ]
    first, *widths = (max(map(len, column)) for column in zip(head, *rows, strict=True))
    return "\n".join(
        "  ".join(
            [row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], widths, strict=True))]
        )
        for row in (head, *rows)
    )


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt speech make-bundle",
        description="Put sets into a folder with a selector that chooses among them by the noise, "
        "and with the error rates that it chooses by.",
        epilog="The selector is trained on the training clips; the error rates are those of the "
        "validation clips, which no set should have been trained on: give the configuration that "
        "the sets were trained with, or a manifest with a column `split`.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="the bundle")
    sets = parser.add_mutually_exclusive_group(required=True)
    named = "a set's file, which says what noise it is for; its name is the set's"
    sets.add_argument("--set", action="append", metavar="[NAME=]FILE", help=named)
    added = "take a set into the bundle that is in FOLDER; the others stay as they are"
    sets.add_argument("--add", action="append", metavar="[NAME=]FILE", help=added)
    data = "manifests (path,text,speaker,split), or a configuration of `fit`"
    add("--data", nargs="+", type=Path, required=True, metavar="FILE", help=data)
    add("--general", metavar="NAME", help="the set for unknown sound; default: none, the base")
    add("--noise-folder", metavar="FOLDER", help="recordings of noise; default: generated noise")
    add("--clean", action="store_true", help="clips without noise are a scenario, too")
    unsure = "below this probability of the likeliest noise the general set is taken; default: 0"
    add("--threshold", type=float, metavar="P", help=unsure)
    add("--limit", type=_positive, metavar="N", help="so many validation clips; default: all")
    add("--steps", type=_positive, default=400, metavar="N", help="of the selector; default: 400")
    heard = "of a clip that the selector is trained on; default: 3"
    add("--seconds", type=float, default=3.0, metavar="S", help=heard)
    add("--batch", type=_positive, default=8, metavar="N", help="clips side by side; default: 8")
    add("--seed", type=int, default=0, metavar="N", help="of all that is drawn; default: 0")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
