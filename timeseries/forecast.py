"""`polyadapt timeseries forecast`: the rows after a table's last, by a set or by fitting one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.cli import OneLineParser
from ..core.container import write_atomically
from ..core.errors import AdaptError
from .backbones import Backbone, NoLanguageModel, OneAttention
from .columns import refuse_columns, trained_columns
from .compare import backbone_called
from .forecaster import Forecaster, device
from .frames import read_frame
from .outlook import Outlook, as_csv
from .own_fit import Plan, described, fit_table
from .pictures import forecast_picture, panels_of
from .series import Series
from .tables import read_long, read_table, side_by_side

_OWN: dict[str, Backbone] = {"none": NoLanguageModel(), "attention": OneAttention()}
_OF_A_PLAN = ("look_back", "epochs", "windows", "seed")
_OF_A_FIT = (*_OF_A_PLAN, "backbone", "blocks", "save")


def main(argv: list[str]) -> int:
    """Forecast a table; the forecast goes to stdout or --out, all talk to stderr."""
    asked = _parser().parse_args(argv)
    _check(asked)
    known = Forecaster.from_file(asked.set, device()) if asked.set else None
    tables = _read(asked, known)
    forecaster = known or _fitted(asked, tables.whole["table"])
    found = {name: forecaster.forecast(s, asked.horizon) for name, s in tables.whole.items()}
    text = as_csv(tables.apart(found), asked.time or "row", asked.id)
    if asked.picture:
        write_atomically(asked.picture, _picture(tables, found, asked.table.stem))
        _say(f"picture: {asked.picture}")
    if asked.out is None:
        print(text, end="")
    else:
        write_atomically(asked.out, text.encode())
        _say(f"forecast: {asked.out}")
    return 0


@dataclass(frozen=True)
class Tables:
    """What is forecast, by name: a table, or series below each other.

    `whole`: what a forecaster sees: "table", or each series by itself; `parts`: for series that it
    sees as the channels of one table, the channels of each.
    """

    whole: Mapping[str, Series]
    parts: Mapping[str, tuple[str, ...]]

    def apart(self, found: Mapping[str, Outlook]) -> Mapping[str, Outlook]:
        """The forecasts by series."""
        if not self.parts:
            return found
        apart, first = {}, 0
        for name, columns in self.parts.items():
            place = slice(first, first + len(columns))
            apart[name], first = found["table"].channels(place, columns), place.stop
        return apart


def _read(asked: argparse.Namespace, known: Forecaster | None) -> Tables:
    how = {
        "time": asked.time,
        "frequency": asked.frequency,
        "missing": asked.missing,
        "time_format": asked.time_format,
        "covariates": asked.covariates,
    }
    if asked.id is None:
        columns = asked.columns or _trained(asked.table, known)
        return Tables({"table": read_table(asked.table, columns=columns, **how)}, {})
    series = read_long(asked.table, id=asked.id, columns=asked.columns, **how)
    if known is not None and known.about.scaler is None:
        return Tables(series, {})  # it takes any series by itself
    if known is not None and known.about.names is not None:
        series = _in_order(series, known.about.names)
    whole = side_by_side(series)
    if known is not None and known.about.names not in (None, whole.names):
        refuse_columns(known.about.names or (), whole.names, asked.table, known.called)
    return Tables({"table": whole}, {name: one.names for name, one in series.items()})


def _in_order(series: Mapping[str, Series], names: Sequence[str]) -> dict[str, Series]:
    """The series in the order of the trained ones, those that were not among them last."""

    def place(name: str) -> int:
        own = {name, *(f"{name}.{column}" for column in series[name].names)}
        return next((at for at, trained in enumerate(names) if trained in own), len(names))

    return {name: series[name] for name in sorted(series, key=place)}


def _trained(table: Path, known: Forecaster | None) -> Sequence[str] | None:
    """The columns that a set was trained on, which the table must have."""
    if known is None or known.about.names is None:
        return None
    there = list(read_frame(table).columns)
    return trained_columns(known.about.names, there, table, known.called)


def _fitted(asked: argparse.Namespace, series: Series) -> Forecaster:
    """Fit to the table, and say what that is worth."""
    plan = Plan(backbone=_backbone(asked), horizon=asked.horizon, **_given(asked, _OF_A_PLAN))
    _say(f"fitting {described(plan)}")
    fit = fit_table(series, plan)
    _say(f"fitted in {fit.seconds:.0f} s\n{fit.report()}")
    for measure, names in fit.better.items():
        _say(f"note: by {measure}, {' and '.join(names)} did no worse there, and needs no model")
    if asked.save is not None:
        fit.task.save_adapter(asked.save)
        _say(f"adapter file: {asked.save}")
    return Forecaster(fit.task.about, fit.task.network, "the fitted set")


def _backbone(asked: argparse.Namespace) -> Backbone:
    blocks = 3 if asked.blocks is None else asked.blocks
    word = asked.backbone or "minilm"
    return _OWN.get(word) or backbone_called(word, blocks)


def _given(asked: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}


def _check(asked: argparse.Namespace) -> None:
    """Before anything is read: a fit takes a minute, and must not be for nothing."""
    if asked.set is None and asked.horizon is None:
        raise AdaptError("--horizon STEPS is needed: how many rows to forecast")
    if asked.horizon is not None and asked.horizon < 1:
        raise AdaptError(f"--horizon {asked.horizon} is not allowed: from 1")
    if asked.set is not None and (idle := _given(asked, _OF_A_FIT)):
        raise AdaptError(f"--{next(iter(idle)).replace('_', '-')} is of a fit: with --set none is")
    for place in (asked.out, asked.picture, asked.save):
        if place is not None and not place.parent.is_dir():
            raise AdaptError(f"cannot write {place}: the folder {place.parent} does not exist")


def _picture(tables: Tables, found: Mapping[str, Outlook], title: str) -> bytes:
    panels = [
        replace(panel, name=f"{name}: {panel.name}" if len(found) > 1 else panel.name)
        for name, outlook in found.items()
        for panel in panels_of(tables.whole[name], outlook)
    ]
    ahead = len(next(iter(found.values())).values)
    return forecast_picture(panels, f"{title}, {ahead} rows ahead")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt timeseries forecast",
        description="Forecast the rows after a table's last one: with an adapter file, or with a"
        " small model that is fitted to the first 70 % of the table and measured on the last 20 %"
        " beside the last value and the season before.",
    )
    add = parser.add_argument
    add("table", type=Path, metavar="TABLE", help="CSV or Parquet, a column for each series")
    add("--horizon", type=int, metavar="STEPS", help="rows to forecast; with --set, up to its own")
    add("--set", type=Path, metavar="FILE", help="an adapter file; nothing is fitted")
    add("--out", type=Path, metavar="FILE", help="the forecast as CSV; default: to stdout")
    add("--picture", type=Path, metavar="PNG", help="the past, the forecast and its intervals")
    table = parser.add_argument_group("how the table is read")
    add_table_arguments(table.add_argument)
    fit = parser.add_argument_group("what is fitted without --set")
    add = fit.add_argument
    words = (
        "minilm (offline, the default), gpt2, none, attention, a name of transformers or a folder"
    )
    add("--backbone", metavar="WORD", help=words)
    add("--blocks", type=int, metavar="N", help="of the language model; default: 3")
    add("--look-back", type=int, metavar="L", help="rows; default: a third of those trained on")
    add("--epochs", type=int, metavar="N", help="default: 5")
    add("--windows", type=int, metavar="N", help="trained on in an epoch; default: 1024")
    add("--seed", type=int, metavar="N", help="default: 0")
    add("--save", type=Path, metavar="FILE", help="keep what was fitted, for --set")
    return parser


def add_table_arguments(add: Callable[..., Any]) -> None:
    """How a table is read: the words that `read_table` and `read_long` take."""
    add("--time", metavar="COLUMN", help="with the times; without, rows are the steps")
    add("--time-format", metavar="FORM", help="of the times, as strftime's: %%d/%%m/%%Y")
    add("--columns", nargs="+", metavar="NAME", help="to forecast; default: all, or the set's")
    add("--id", metavar="COLUMN", help="which series a row is of, if they are below each other")
    add("--frequency", metavar="STEP", help="of the rows (h, 15min, D, MS); default: inferred")
    filled = "gaps of up to 24 rows; default: refuse"
    add("--missing", choices=("refuse", "interpolate", "last"), default="refuse", help=filled)
    unknown = "refused by name: what is known ahead is not used"
    add("--covariates", nargs="+", default=(), metavar="NAME", help=unknown)
