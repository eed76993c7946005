"""The time column of a table: read without guessing, in order, one step apart."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np

from ..core.errors import AdaptError
from .frames import shown
from .series import Times, step_in_days

_SPARSEST = 10  # steps per row that there is, at most
_ISO = re.compile(r"\d{4}-\d\d-\d\d")
_DAY_OR_MONTH_FIRST = re.compile(r"\s*\d{1,2}[./-]")


def read_times(column: Any, whose: str, form: str | None = None) -> Times:
    """A column of times as datetime64[ns]; those with an offset are turned into UTC.

    `form` is strftime's. Without it the form is that of the first time, which has to begin with the
    year: 01/02/2020 would be a guess. Numbers are years (2020) or days (20200131). Raises
    `AdaptError` for what is no time, missing, not in order or there twice.
    """
    import pandas as pd

    column = _years_and_days(column, whose) if form is None else column
    first = str(column.iloc[0])
    unclear = AdaptError(
        f"{whose} begins with {shown(first)}: write times like 2020-01-31 00:00, or say their"
        " form, like time_format='%d/%m/%Y'"
    )
    if form is None and _DAY_OR_MONTH_FIRST.match(first):
        raise unclear
    if form is None and _ISO.match(first):
        form = "ISO8601"  # of any precision: some programs leave out the hours of midnight
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # pandas is about to guess
            read = pd.to_datetime(column, errors="coerce", utc=True, format=form)
        times: Times = read.dt.tz_localize(None).astype("datetime64[ns]").to_numpy()
    except (UserWarning, ValueError) as error:
        raise unclear from error
    if np.isnat(times).any():
        row = int(np.isnat(times).argmax())
        what = "has no time" if pd.isna(column.iloc[row]) else f"{shown(column.iloc[row])} is none"
        raise AdaptError(f"{whose}, row {row + 1}: {what}; the first is {shown(first)}")
    _require_order(times, whose)
    return times


def _years_and_days(column: Any, whose: str) -> Any:
    import pandas as pd

    if not pd.api.types.is_numeric_dtype(column):
        return column
    text = column.astype(str)
    if not text.str.fullmatch(r"[12]\d{3}|[12]\d{7}").all() or text.str.len().nunique() > 1:
        raise AdaptError(
            f"{whose} holds the number {column.iloc[0]}: write times like 2020-01-31 00:00, or"
            " leave time out (rows are then the steps)"
        )
    return text


def _require_order(times: Times, whose: str) -> None:
    steps = np.diff(times).astype(np.int64)
    if (steps > 0).all():
        return
    row = int((steps <= 0).argmax()) + 1  # of the earlier one, counted from 1
    if steps[row - 1] == 0:
        raise AdaptError(
            f"{whose}: rows {row} and {row + 1} are both of {at(times[row])}: one row for each"
            " time, or say which column is the id of a series; local times repeat an hour, UTC not"
        )
    raise AdaptError(
        f"{whose}: row {row + 1} of {at(times[row])} follows {at(times[row - 1])}: sort the rows"
    )


def step_of(
    times: Times, frequency: str | None, whose: str, gaps: bool = False
) -> tuple[str | None, Times]:
    """(the step as a frequency of pandas, all times from the first to the last at that step).

    Without `frequency` the step is inferred: the calendar's if there is one, else the commonest.
    Rows that are missing are refused unless `gaps`, times between the steps always. A single time
    has no step.
    """
    import pandas as pd

    if frequency is not None:
        step_in_days(frequency)  # refuses what is none
    index = pd.DatetimeIndex(times)
    frequency = frequency or (pd.infer_freq(index) if len(index) > 2 else None)
    if frequency is None and len(index) == 1:
        return None, times
    if frequency is None:
        frequency = _commonest(times, whose)
    grid = _grid(times, frequency)
    if len(grid) == len(times) and (grid == times).all():
        return frequency, times
    fits = bool(np.isin(times, grid).all())
    if fits and gaps:
        return frequency, grid
    shorter = min(len(grid), len(times))
    row = int(np.append(grid[:shorter] != times[:shorter], True).argmax())
    row = min(row, len(times) - 1)
    after = f" after {at(times[row - 1])}" if row else ""
    fill = "fill the gap with missing=interpolate or last, " if fits else ""
    raise AdaptError(
        f"{whose}, row {row + 1}: {at(times[row])}{after} is not one step of {frequency}: {fill}say"
        " the right frequency, or leave time out (rows are then the steps)"
    )


def _grid(times: Times, frequency: str) -> Times:
    """All times from the first to the last, a step apart; cut where most of them are missing."""
    import pandas as pd

    ends = times[[0, -1]].astype("datetime64[s]")  # in ns, 300 years are no difference any more
    first, last = pd.Timestamp(times[0]), pd.Timestamp(times[-1])
    # A wrong step must not fill the memory: years of seconds are 10^8 times.
    days = step_in_days(frequency) * (_SPARSEST * len(times) + 100)
    if days < (ends[1] - ends[0]) / np.timedelta64(1, "D"):
        last = first + pd.Timedelta(days=days)
    grid: Times = pd.date_range(first, last, freq=frequency).to_numpy("datetime64[ns]")
    return grid


def _commonest(times: Times, whose: str) -> str:
    import pandas as pd

    steps, counts = np.unique(np.diff(times), return_counts=True)
    step = steps[counts.argmax()]
    if 2 * counts.max() < len(times) - 1:
        raise AdaptError(
            f"{whose}: the times are irregular, steps are from {pd.Timedelta(steps[0])} to"
            f" {pd.Timedelta(steps[-1])}: resample them to one step, or leave time out"
        )
    days, rest = divmod(pd.Timedelta(step), pd.Timedelta(days=1))
    if not rest:  # whole days, which pandas 3 would call 24h
        return "D" if days == 1 else f"{days}D"
    return str(pd.tseries.frequencies.to_offset(pd.Timedelta(step)).freqstr)


def at(time: np.datetime64) -> str:
    """A time in a message, a day without its hours.

    >>> at(np.datetime64("2020-01-31")), at(np.datetime64("2020-01-31T06:30"))
    ('2020-01-31', '2020-01-31 06:30:00')
    """
    import pandas as pd

    return str(pd.Timestamp(time)).removesuffix(" 00:00:00")
