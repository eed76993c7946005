"""`polyadapt timeseries predict`: what an adapter file says of the rows of a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..core.cli import OneLineParser
from ..core.container import write_atomically
from ..core.errors import AdaptError
from .aim import Aim
from .aims import Classify, Forecast, Impute, Reconstruct
from .backtest import as_frame, backtest
from .columns import trained_columns
from .deployed import Deployed, channels_of
from .description import describe, load_set
from .forecaster import Forecaster, device
from .frames import numbers, read_frame
from .metrics import anomaly_threshold
from .series import Values
from .tables import read_table

if TYPE_CHECKING:
    import pandas as pd

_AT_ONCE = 256  # windows in a pass


def main(argv: list[str]) -> int:
    """Write the table that the set's aim makes of a table; what is said of it goes to stderr."""
    asked = _parser().parse_args(argv)
    aim = describe(asked.set).aim
    frame, said = _OF_AIM[type(aim)](asked)
    text = frame.to_csv(index=False, float_format="%.8g")
    if asked.out is None:
        print(text, end="")
    else:
        write_atomically(asked.out, text.encode())
    print(said, file=sys.stderr)
    return 0


class Model:
    """A set that classifies, fills or judges: windows [n, L, C] in their own units -> answers.

    Raises `StoreError` for a file that is missing, damaged or holds no time series model.
    """

    def __init__(self, path: Path) -> None:
        self.about = describe(path)
        network = self.about.network().eval()
        load_set(network, path)
        self.path = path
        self.length, self.channels = self.about.look_back, channels_of(self.about)
        # Scaled here in fp64: in fp32 a small change of a large number is lost.
        self.module = Deployed(replace(self.about, scaler=None), network).to(device())

    @torch.inference_mode()
    def __call__(self, windows: Values) -> Values:
        """See `Deployed`; what is filled is in the units of the table, scores stay scaled."""
        scaler = self.about.scaler
        scaled = windows if scaler is None else scaler.apply(windows)
        found = []
        for first in range(0, len(scaled), _AT_ONCE):
            x = torch.from_numpy(scaled[first : first + _AT_ONCE]).float().to(device())
            found.append(self.module(x).double().cpu().numpy())
        answers: Values = np.concatenate(found)
        fills = isinstance(self.about.aim, Impute) and scaler is not None
        return scaler.undo(answers) if fills and scaler is not None else answers

    def read(self, frame: pd.DataFrame, table: Path, chosen: Sequence[str] | None) -> Values:
        """[rows, C], NaN where one is missing: the columns that were trained on, or `chosen`."""
        names = self.names(frame, table, chosen)
        found = [numbers(frame[name], f"{table}, column {name!r}") for name in names]
        return np.stack(found, axis=1)

    def names(self, frame: pd.DataFrame, table: Path, chosen: Sequence[str] | None) -> list[str]:
        """Their names."""
        trained = self.about.names or ()
        if chosen is None and not trained:
            raise AdaptError(f"{self.path} names no columns: name them with --columns")
        wanted = trained if chosen is None else chosen
        names = trained_columns(wanted, list(frame.columns), table, self.path)
        if len(names) != self.channels:
            raise AdaptError(
                f"{len(names)} columns are named, {self.path} was trained on {self.channels}"
            )
        return list(names)


def tiles(rows: int, length: int, whose: object = "the table") -> list[tuple[int, int]]:
    """Windows that cover all rows: (first row, rows of it that are new); the last ends at the end.

    >>> tiles(10, 4)
    [(0, 4), (4, 4), (6, 2)]
    """
    if rows < length:
        raise AdaptError(f"{whose} has {rows} rows: a window of the set has {length}")
    found = [(first, length) for first in range(0, rows - length + 1, length)]
    rest = rows % length
    return [*found, (rows - length, rest)] if rest else found


def _by_rows(model: Model, values: Values, table: Path) -> Values:
    """The answers for all rows of a table, [rows] or [rows, C], each from one window."""
    places = tiles(len(values), model.length, table)
    windows = np.stack([values[first : first + model.length] for first, _ in places])
    if len(empty := np.argwhere(np.isnan(windows).all(axis=1))):
        first = places[int(empty[0, 0])][0]
        raise AdaptError(
            f"{table}: a column has no value in rows {first + 1} to {first + model.length}: a"
            f" window of {model.length} rows needs one"
        )
    answers = model(windows)
    parts = [found[-new:] for found, (_, new) in zip(answers, places, strict=True)]
    return np.concatenate(parts)


def _filled(asked: argparse.Namespace) -> tuple[pd.DataFrame, str]:
    """The table with its gaps filled; other columns and values stay."""
    model, frame = Model(asked.set), read_frame(asked.table)
    values = model.read(frame, asked.table, asked.columns)
    gaps = np.isnan(values)
    answers = _by_rows(model, values, asked.table) if gaps.any() else values
    frame[model.names(frame, asked.table, asked.columns)] = np.where(gaps, answers, values)
    return frame, f"{int(gaps.sum()):,} values are filled"


def _judged(asked: argparse.Namespace) -> tuple[pd.DataFrame, str]:
    """The score of every row; with --normal also whether it is an anomaly."""
    model, frame = Model(asked.set), read_frame(asked.table)
    scores = _scores(model, frame, asked.table, asked.columns)
    known = frame[[asked.time]] if asked.time in frame.columns else frame[[]]
    found = known.assign(score=scores)
    if asked.normal is None:
        return found, "scores are squared errors; --normal TABLE tells from where on is odd"
    aim = model.about.aim
    assert isinstance(aim, Reconstruct), "main has looked"
    usual = _scores(model, read_frame(asked.normal), asked.normal, asked.columns)
    threshold = anomaly_threshold(torch.from_numpy(usual), aim.share)
    found["anomaly"] = (scores > threshold).astype(int)
    rule = f"{aim.share:g} of the rows of {asked.normal} are above it"
    return found, f"{int(found['anomaly'].sum()):,} rows above {threshold:.4g}; {rule}"


def _scores(model: Model, frame: pd.DataFrame, table: Path, chosen: Sequence[str] | None) -> Values:
    values = model.read(frame, table, chosen)
    if (lost := np.isnan(values).any(axis=1)).any():
        raise AdaptError(f"{table}, row {int(lost.argmax()) + 1}: a value is missing")
    return _by_rows(model, values, table)


def _classified(asked: argparse.Namespace) -> tuple[pd.DataFrame, str]:
    """The class and its probability, of the whole table or of each series below each other.

    A series that is shorter than a window is lengthened by its last row, as in training.
    """
    import pandas as pd

    model, frame = Model(asked.set), read_frame(asked.table)
    if asked.id is not None and asked.id not in frame.columns:
        raise AdaptError(f"{asked.table}: there is no column {asked.id!r}: {', '.join(frame)}")
    groups = {"": frame} if asked.id is None else dict(iter(frame.groupby(asked.id, sort=False)))
    windows = []
    for name, own in groups.items():
        values = model.read(own, asked.table, asked.columns)
        if len(values) > model.length or np.isnan(values).any():
            raise AdaptError(
                f"{asked.table}{f', series {name!r}' if asked.id else ''}: {len(values)} rows,"
                f" {int(np.isnan(values).sum())} values missing: up to {model.length} rows and none"
            )
        windows.append(np.pad(values, ((0, model.length - len(values)), (0, 0)), mode="edge"))
    aim = model.about.aim
    assert isinstance(aim, Classify), "main has looked"
    chances = model(np.stack(windows))
    found = {} if asked.id is None else {asked.id: list(groups)}
    found["class"] = [aim.classes[at] for at in chances.argmax(axis=1)]
    told = pd.DataFrame(found | {"probability": chances.max(axis=1)})
    return told, f"{len(told)} series of up to {model.length} rows"


def _forecast(asked: argparse.Namespace) -> tuple[pd.DataFrame, str]:
    """What the set would have forecast of the last rows, beside what came."""
    forecaster = Forecaster.from_file(asked.set, device())
    names = forecaster.about.names
    if asked.columns is None and names is not None:
        trained_columns(names, list(read_frame(asked.table).columns), asked.table, asked.set)
    series = read_table(asked.table, time=asked.time, columns=asked.columns or names)
    found = backtest(forecaster, series, asked.share, asked.every)
    lines = [f"{n:<16} MSE {mse:.4f}  MAE {mae:.4f}" for n, (mse, mae) in found.errors.items()]
    told = f"{len(found.starts):,} windows of {forecaster.aim.horizon} rows, scaled columns"
    frame = as_frame(found, forecaster.levels, asked.time or "row")
    return frame, "\n".join([told, *lines])


_OF_AIM: dict[type[Aim], Callable[[argparse.Namespace], tuple[pd.DataFrame, str]]] = {
    Forecast: _forecast,
    Impute: _filled,
    Reconstruct: _judged,
    Classify: _classified,
}


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt timeseries predict",
        description="By what the set was trained for: its forecasts of a table's last rows beside"
        " what came, the table with its gaps filled, the score of every row, or classes.",
        epilog="`polyadapt timeseries forecast` forecasts the rows after the last one.",
    )
    add = parser.add_argument
    add("table", type=Path, metavar="TABLE", help="CSV or Parquet")
    add("--set", type=Path, required=True, metavar="FILE", help="the adapter file")
    add("--out", type=Path, metavar="FILE", help="what is found as CSV; default: to stdout")
    add("--time", metavar="COLUMN", help="with the times; without, rows are the steps")
    add("--columns", nargs="+", metavar="NAME", help="the channels; default: those trained on")
    add("--id", metavar="COLUMN", help="classes: which series a row is of; default: all of one")
    add(
        "--share", type=float, default=0.2, metavar="S", help="forecasts: of the rows; default: 0.2"
    )
    add("--every", type=int, metavar="N", help="forecasts: rows between two; default: the horizon")
    usual = "scores: a table without anomalies, whose scores make the threshold"
    add("--normal", type=Path, metavar="TABLE", help=usual)
    return parser
