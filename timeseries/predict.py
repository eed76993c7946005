"""`polyadapt timeseries predict`: what an adapter file says of the rows of a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..core.cli import OneLineParser
from ..core.container import require_place, write_atomically
from ..core.errors import AdaptError
from .aim import Aim
from .aims import Classify, Forecast, Impute, Reconstruct
from .backtest import as_frame, backtest
from .description import describe
from .forecaster import Forecaster, device, require_step
from .frames import read_frame, require_columns
from .gaps import filled
from .metrics import anomaly_threshold
from .series import Values
from .table_words import add_table_arguments, tables_of
from .times import read_times, step_of
from .windowed import Model, by_rows

if TYPE_CHECKING:
    import pandas as pd

_SHARE = 0.2  # of the rows that are forecast


def main(argv: list[str]) -> int:
    """Write the table that the set's aim makes of a table; what is said of it goes to stderr."""
    parser = _parser()
    asked = parser.parse_args(argv)
    if asked.out is not None:
        require_place(asked.out)
    kind = type(describe(asked.set).aim)
    _refuse_idle(asked, parser, kind)
    frame, said = _OF_AIM[kind].run(asked)
    text = frame.to_csv(index=False, float_format="%.8g")
    if asked.out is None:
        print(text, end="")
    else:
        write_atomically(asked.out, text.encode())
    print(said, file=sys.stderr)
    return 0


def _refuse_idle(
    asked: argparse.Namespace, parser: argparse.ArgumentParser, kind: type[Aim]
) -> None:
    """A word that the set's aim has no use for would be ignored."""
    taken = _OF_AIM[kind].takes
    given = [name for name, value in vars(asked).items() if value != parser.get_default(name)]
    if idle := [name for name in given if name not in ("table", "set", "out", "columns", *taken)]:
        first, *rest = (f"--{name.replace('_', '-')}" for name in (idle[0], "columns", *taken))
        raise AdaptError(
            f"{first} does nothing with {asked.set}, which was trained to {kind.__name__}; it"
            f" takes {', '.join(rest)}"
        )


def _filled(asked: argparse.Namespace) -> tuple[pd.DataFrame, str]:
    """The table with its gaps filled, those of rows that are missing, too; all else stays."""
    model, frame = Model(asked.set), read_frame(asked.table)
    frame = _in_time(asked, model, frame, asked.table, gaps=True)
    values = model.read(frame, asked.table, asked.columns)
    gaps = np.isnan(values)
    answers = by_rows(model, values, asked.table) if gaps.any() else values
    frame[model.names(frame, asked.table, asked.columns)] = np.where(gaps, answers, values)
    return frame, f"{int(gaps.sum()):,} values are filled"


def _judged(asked: argparse.Namespace) -> tuple[pd.DataFrame, str]:
    """The score of every row; with --normal also whether it is an anomaly."""
    model = Model(asked.set)
    frame, scores = _scores(asked, model, asked.table)
    found = (frame[[]] if asked.time is None else frame[[asked.time]]).assign(score=scores)
    if asked.normal is None:
        return found, "scores are squared errors; --normal TABLE tells from where on is odd"
    aim = model.about.aim
    assert isinstance(aim, Reconstruct), "main has looked"
    _, usual = _scores(asked, model, asked.normal)
    threshold = anomaly_threshold(torch.from_numpy(usual), aim.share)
    found["anomaly"] = (scores > threshold).astype(int)
    rule = f"{aim.share:g} of the rows of {asked.normal} are above it"
    return found, f"{int(found['anomaly'].sum()):,} rows above {threshold:.4g}; {rule}"


def _scores(asked: argparse.Namespace, model: Model, table: Path) -> tuple[pd.DataFrame, Values]:
    """A table and the score of each of its rows."""
    frame = _in_time(asked, model, read_frame(table), table, gaps=asked.missing != "refuse")
    values = model.read(frame, table, asked.columns)
    names = model.names(frame, table, asked.columns)
    whole = filled(values, names, asked.missing, whose=str(table))
    return frame, by_rows(model, whole, table)


def _in_time(
    asked: argparse.Namespace, model: Model, frame: pd.DataFrame, table: Path, gaps: bool
) -> pd.DataFrame:
    """The rows, if their times are in order and a step apart; with `gaps` missing ones are put in.

    Without --time rows are the steps.
    """
    if asked.time is None:
        return frame
    import pandas as pd

    require_columns(frame, [asked.time], table)
    whose = f"{table}, column {asked.time!r}"
    own = read_times(frame[asked.time], whose, asked.time_format)
    frequency, times = step_of(own, asked.frequency, whose, gaps)
    require_step(model.about.frequency, frequency, asked.set)
    if len(times) == len(own):
        return frame
    whole = frame.set_axis(pd.DatetimeIndex(own)).reindex(times).reset_index(drop=True)
    return whole.assign(**{asked.time: times})


def _classified(asked: argparse.Namespace) -> tuple[pd.DataFrame, str]:
    """The class and its probability, of the whole table or of each series below each other.

    A series that is shorter than a window is lengthened by its last row, as in training.
    """
    import pandas as pd

    model, frame = Model(asked.set), read_frame(asked.table)
    if asked.id is not None:
        require_columns(frame, [asked.id], asked.table)
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
    whole = tables_of(asked, forecaster).whole
    if len(whole) > 1:
        raise AdaptError(
            f"{asked.set} takes series one by one, {asked.table} has {len(whole)}: predict each"
            " from a table of its own"
        )
    (series,) = whole.values()
    share = _SHARE if asked.share is None else asked.share
    found = backtest(forecaster, series, share, asked.every)
    lines = [f"{n:<16} MSE {mse:.4f}  MAE {mae:.4f}" for n, (mse, mae) in found.errors.items()]
    units = "units of the table" if forecaster.about.scaler is None else "scaled columns"
    told = f"{len(found.starts):,} windows of {forecaster.aim.horizon} rows, {units}"
    frame = as_frame(found, forecaster.levels, asked.time or "row")
    return frame, "\n".join([told, *lines])


@dataclass(frozen=True)
class _Way:
    """How a set of some aim is asked: what makes the answer, and the words that it takes."""

    run: Callable[[argparse.Namespace], tuple[pd.DataFrame, str]]
    takes: tuple[str, ...]


_TIMES = ("time", "time_format", "frequency")
_OF_AIM: dict[type[Aim], _Way] = {
    Forecast: _Way(_forecast, (*_TIMES, "missing", "covariates", "id", "share", "every")),
    Impute: _Way(_filled, _TIMES),
    Reconstruct: _Way(_judged, (*_TIMES, "missing", "normal")),
    Classify: _Way(_classified, ("id",)),
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
    add_table_arguments(parser.add_argument_group("how the table is read").add_argument)
    more = parser.add_argument_group("of one aim").add_argument
    more("--share", type=float, metavar="S", help=f"forecasts: of the rows; default: {_SHARE:g}")
    more("--every", type=int, metavar="N", help="forecasts: rows between two; default: the horizon")
    usual = "scores: a table without anomalies, whose scores make the threshold"
    more("--normal", type=Path, metavar="TABLE", help=usual)
    return parser
