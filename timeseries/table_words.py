"""A table on the command line: the words that say how it is read, and what they make of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .columns import refuse_series, trained_columns
from .forecaster import Forecaster
from .frames import read_frame
from .outlook import Outlook
from .series import Series
from .tables import read_long, read_table, side_by_side


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


def tables_of(asked: argparse.Namespace, known: Forecaster | None) -> Tables:
    """The table that was asked for, with the columns or series of a known set."""
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
        refuse_series(known.about.names or (), whole.names, asked.table, known.called)
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


def add_table_arguments(add: Callable[..., Any]) -> None:
    """How a table is read: the words that `read_table` and `read_long` take."""
    add("--time", metavar="COLUMN", help="with the times; without, rows are the steps")
    add("--time-format", metavar="FORM", help="of the times, as strftime's: %%d/%%m/%%Y")
    add("--columns", nargs="+", metavar="NAME", help="the channels; default: all, or the set's")
    add("--id", metavar="COLUMN", help="which series a row is of, if they are below each other")
    add("--frequency", metavar="STEP", help="of the rows (h, 15min, D, MS); default: inferred")
    filled = "gaps of up to 24 rows; default: refuse"
    add("--missing", choices=("refuse", "interpolate", "last"), default="refuse", help=filled)
    unknown = "refused by name: what is known ahead is not used"
    add("--covariates", nargs="+", default=(), metavar="NAME", help=unknown)
