"""Missing values of a table: refused by name, or filled where the gap is short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..core.errors import AdaptError, require_word
from .series import Values

Missing = Literal["refuse", "interpolate", "last"]

LONGEST = 24  # rows; what is filled over more is invented rather than mended


def filled(
    values: Values,
    names: Sequence[str],
    missing: Missing = "refuse",
    longest: int = LONGEST,
    whose: str = "the table",
) -> Values:
    """Values [rows, C] without NaN.

    refuse: there must be none; interpolate: on the straight line between the values before and
    after; last: the value before. Runs of more than `longest` rows are refused, and what has no
    value to fill from: the first rows, and for interpolate the last ones. `AdaptError` names the
    column and the rows, counted from 1.

    >>> filled(np.array([[1.0], [np.nan], [np.nan], [4.0]]), ["x"], "interpolate").ravel().tolist()
    [1.0, 2.0, 3.0, 4.0]
    >>> filled(np.array([[1.0], [np.nan]]), ["x"], "last").ravel().tolist()
    [1.0, 1.0]
    """
    require_word("missing", missing, Missing)
    lost = np.isnan(values)
    if not lost.any():
        return values
    values = values.copy()
    for place in np.flatnonzero(lost.any(axis=0)):
        column = f"{whose}, column {names[place]!r}"
        for start, stop in runs(lost[:, place]):
            _require_fillable(start, stop, len(values), missing, longest, column)
        values[:, place] = _fill(values[:, place], lost[:, place], missing)
    return values


def runs(where: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The runs of True as (first, end exclusive).

    >>> runs(np.array([True, False, True, True]))
    [(0, 1), (2, 4)]
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], where, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _require_fillable(
    start: int, stop: int, rows: int, missing: Missing, longest: int, column: str
) -> None:
    if stop - start == rows:
        raise AdaptError(f"{column} has no value at all: leave it out")
    where = f"row {start + 1}" if stop == start + 1 else f"rows {start + 1} to {stop}"
    if stop == rows and missing != "last":
        ahead = "cut these rows (values known ahead of time are not supported), or missing=last"
        raise AdaptError(f"{column} has no value in its last {where}: {ahead}")
    if start == 0:
        raise AdaptError(f"{column} begins without a value, {where}: cut these rows")
    if stop - start > longest:
        raise AdaptError(
            f"{column} has no value in {where}: a run of {stop - start}, up to {longest} are filled"
        )
    if missing == "refuse":
        raise AdaptError(f"{column} has no value in {where}: missing=interpolate or last fills it")


def _fill(column: Values, lost: NDArray[np.bool_], missing: Missing) -> Values:
    rows = np.arange(len(column))
    if missing == "interpolate":
        between: Values = np.interp(rows, rows[~lost], column[~lost])
        return between
    before: Values = column[np.maximum.accumulate(np.where(lost, 0, rows))]
    return before
