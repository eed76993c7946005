"""What is forecast for a series: the rows after its last one, their times, and both as CSV."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..core.errors import AdaptError
from .series import Series, Times, Values

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Outlook:
    """The rows after a series: values [T, C] of its channels; for levels of quantiles the same.

    times: datetime64 [T]; None if the series has none, then rows are counted on from `first`.
    """

    names: tuple[str, ...]
    values: Values
    times: Times | None
    first: int
    quantiles: Mapping[float, Values] = field(default_factory=dict)

    def frame(self, time: str) -> pd.DataFrame:
        """A column for the time (or the row), then for each channel; `NAME q0.9` for quantiles."""
        import pandas as pd

        when = (
            range(self.first, self.first + len(self.values)) if self.times is None else self.times
        )
        found: dict[str, object] = {time: when}
        for place, name in enumerate(self.names):
            found[name] = self.values[:, place]
            for level, values in self.quantiles.items():
                found[f"{name} q{level:g}"] = values[:, place]
        return pd.DataFrame(found)

    def channels(self, place: slice, names: tuple[str, ...]) -> Outlook:
        """Some channels only, under other names."""
        levels = {level: values[:, place] for level, values in self.quantiles.items()}
        return replace(self, names=names, values=self.values[:, place], quantiles=levels)


def later_times(series: Series, rows: int) -> Times | None:
    """The times of the `rows` rows after a series, at its frequency; None if it has no times.

    >>> import numpy as np
    >>> months = np.array(["2024-11-01", "2024-12-01"], "datetime64[ns]")
    >>> later_times(Series(np.zeros((2, 1)), ("y",), months, "MS"), 2).astype("datetime64[D]")
    array(['2025-01-01', '2025-02-01'], dtype='datetime64[D]')
    """
    import numpy as np
    import pandas as pd

    if series.times is None:
        return None
    if series.frequency is None:
        raise AdaptError("the step between the rows is not known: name it with --frequency")
    step = pd.tseries.frequencies.to_offset(series.frequency)
    last = pd.Timestamp(series.times[-1])
    return np.array([last + step * ahead for ahead in range(1, rows + 1)], "datetime64[ns]")


def as_csv(outlooks: Mapping[str, Outlook], time: str, id: str | None = None) -> str:
    """One table of all; `id` names a first column for the keys, without it there is one forecast.

    >>> import numpy as np
    >>> print(as_csv({"": Outlook(("y",), np.array([[1.5], [2.0]]), None, first=10)}, "row"))
    row,y
    10,1.5
    11,2
    <BLANKLINE>
    """
    import pandas as pd

    frames = []
    for key, outlook in outlooks.items():
        frame = outlook.frame(time)
        if id is not None:
            frame.insert(0, id, key)
        frames.append(frame)
    text: str = pd.concat(frames).to_csv(index=False, float_format="%.8g")
    return text
