"""Tables of any origin as series: wide, a column per channel, or long, a row per measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import AdaptError
from .columns import once
from .frames import numbers, read_frame, require_columns
from .gaps import LONGEST, Missing, filled
from .series import Series
from .times import at, read_times, step_of


@dataclass(frozen=True)
class _Rules:
    time: str | None
    time_format: str | None
    frequency: str | None
    missing: Missing
    longest: int


def read_table(
    path: str | Path,
    *,
    time: str | None = None,
    columns: Sequence[str] | None = None,
    frequency: str | None = None,
    missing: Missing = "refuse",
    longest: int = LONGEST,
    time_format: str | None = None,
    covariates: Sequence[str] = (),
) -> Series:
    """A CSV or Parquet file whose columns are the channels of one series.

    time: the column with the times, None where rows are simply the steps; columns: the channels,
    None takes all others; frequency: the step in pandas' words, None infers it; missing: what
    happens to missing values and rows, see `gaps.filled`; time_format: see `times.read_times`.
    Raises `AdaptError`, one line with the column and the row (from 1, the header not counted), for
    text, missing values, and times that are unsorted, there twice or irregular. `covariates` are
    refused by name: nothing here forecasts with what is known ahead.

    >>> rows = ["at,load", "2020-01-01 00:00,3", "2020-01-01 01:00,4", "2020-01-01 02:00,5"]
    >>> written = Path("load.csv").write_text("\\n".join(rows))
    >>> series = read_table("load.csv", time="at")
    >>> series.names, series.values.ravel().tolist(), series.frequency
    (('load',), [3.0, 4.0, 5.0], 'h')
    """
    _refuse(covariates)
    rules = _Rules(time, time_format, frequency, missing, longest)
    return _series(read_frame(path), columns, rules, str(path))


def read_long(
    path: str | Path,
    *,
    id: str,
    time: str | None = None,
    columns: Sequence[str] | None = None,
    frequency: str | None = None,
    missing: Missing = "refuse",
    longest: int = LONGEST,
    time_format: str | None = None,
    covariates: Sequence[str] = (),
) -> dict[str, Series]:
    """A file with several series below each other, told apart by the column `id`, in its order.

    Their rows may be mixed, each series' own are in order; they may have different lengths and
    times. The other settings are `read_table`'s, and rows are counted within a series.
    """
    _refuse(covariates)
    rules = _Rules(time, time_format, frequency, missing, longest)
    frame = read_frame(path)
    require_columns(frame, [id], path)
    if frame[id].isna().any():
        raise AdaptError(f"{path}: row {int(frame[id].isna().argmax()) + 1} has no {id!r}")
    return {
        str(name): _series(
            own.drop(columns=id).reset_index(drop=True), columns, rules, f"{path}, series {name!r}"
        )
        for name, own in frame.groupby(id, sort=False)
    }


def side_by_side(series: Mapping[str, Series]) -> Series:
    """Series of the same times as the channels of one; a single column is called after its series.

    >>> a, b = (Series(np.full((2, 1), x), ("sold",)) for x in (1.0, 2.0))
    >>> side_by_side({"tea": a, "milk": b}).names
    ('tea', 'milk')
    """
    first_name, first = next(iter(series.items()))
    for name, other in series.items():
        if len(other) != len(first) or not _same(first.times, other.times):
            raise AdaptError(
                f"series {name!r} ({_span(other)}) and {first_name!r} ({_span(first)}) are not of"
                " the same times: cut them to a common span, or forecast them one by one"
            )
    names = [
        name if len(one.names) == 1 else f"{name}.{column}"
        for name, one in series.items()
        for column in one.names
    ]
    values = np.concatenate([one.values for one in series.values()], axis=1)
    return Series(values, tuple(names), first.times, first.frequency)


def read_standard(path: str | Path, frequency: str) -> Series:
    """A benchmark's file: all columns but `date`, rows as steps of a known frequency."""
    frame = read_frame(path)
    require_columns(frame, ["date"], path)
    rules = _Rules(None, None, frequency, "refuse", LONGEST)
    return _series(frame.drop(columns="date"), None, rules, str(path))


def _series(frame: Any, columns: Sequence[str] | None, rules: _Rules, whose: str) -> Series:
    require_columns(frame, [*([rules.time] if rules.time else []), *(columns or [])], whose)
    names = [name for name in once(columns or frame.columns, whose) if name != rules.time]
    if not names:
        raise AdaptError(f"{whose}: there is no column to forecast")
    read = [numbers(frame[name], f"{whose}, column {name!r}") for name in names]
    values, times, frequency = np.stack(read, axis=1), None, rules.frequency
    if rules.time is not None:
        column = f"{whose}, column {rules.time!r}"
        own = read_times(frame[rules.time], column, rules.time_format)
        frequency, times = step_of(own, frequency, column, gaps=rules.missing != "refuse")
        spread = np.full((len(times), len(names)), np.nan)
        spread[np.isin(times, own)] = values
        values = spread
    values = filled(values, names, rules.missing, rules.longest, whose)
    series = Series(values, tuple(names), times, frequency)
    _ = series.season  # a frequency that pandas does not know is refused here
    return series


def _refuse(covariates: Sequence[str]) -> None:
    if covariates:
        raise AdaptError(
            f"known covariates are not supported: {', '.join(map(repr, covariates))}; only the past"
            " of what is forecast is used, so leave them out"
        )


def _same(one: Any, other: Any) -> bool:
    return (one is None) == (other is None) and (one is None or bool((one == other).all()))


def _span(series: Series) -> str:
    if series.times is None:
        return f"{len(series)} rows"
    return f"{len(series)} rows, {at(series.times[0])} to {at(series.times[-1])}"
