"""A series in memory: rows of channels, their names, and the times they were measured at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..core.errors import AdaptError

Values = NDArray[np.float64]
Times = NDArray[np.datetime64]


@dataclass(frozen=True)
class Series:
    """Values [rows, C] (float64, NaN: missing) of named channels, the step from row to row fixed.

    times: datetime64[ns] [rows], None where rows carry no time; frequency: the step, as pandas
    writes it ("h", "15min", "MS"), None where it is not known.

    >>> two = Series(np.zeros((3, 2)), ("load", "OT"), frequency="h")
    >>> two.columns(["OT"]).names, len(two), two.season
    (('OT',), 3, 24)
    """

    values: Values
    names: tuple[str, ...]
    times: Times | None = None
    frequency: str | None = None

    def __len__(self) -> int:
        return len(self.values)

    def columns(self, names: Sequence[str]) -> Series:
        """The channels of these names, in this order."""
        for name in names:
            if name not in self.names:
                raise AdaptError(f"there is no column {name!r}: there are {', '.join(self.names)}")
        places = [self.names.index(name) for name in names]
        return replace(self, values=self.values[:, places], names=tuple(names))

    @property
    def season(self) -> int:
        """Rows of a season: a day below a day's step, a week of days, else a year; 1 if unknown."""
        return 1 if self.frequency is None else season(self.frequency)


def season(frequency: str) -> int:
    """Rows of a season at a frequency of pandas.

    >>> [season(f) for f in ("h", "15min", "10min", "D", "B", "W", "7D", "ME", "QS-OCT", "YS")]
    [24, 96, 144, 7, 5, 52, 52, 12, 4, 1]
    """
    days = step_in_days(frequency)
    whole = 1.0 if days < 1 else 7.0 if days < 7 else 365.25
    return max(1, round(whole / days))


def step_in_days(frequency: str) -> float:
    """The length of a step, for calendar steps on average; a frequency pandas lacks is refused.

    >>> step_in_days("6h"), step_in_days("W")
    (0.25, 7.0)
    """
    import pandas as pd

    unknown = AdaptError(
        f"frequency={frequency!r} is not known: write it as pandas does (h, 15min, D, W, MS)"
    )
    try:
        offset = pd.tseries.frequencies.to_offset(frequency)
        first = pd.Timestamp("2001-01-01") + offset
        days = float((first + 28 * offset - first) / pd.Timedelta(days=28))
    except (ValueError, OverflowError) as error:
        raise unknown from error
    if days <= 0:
        raise unknown
    return days
