"""The forecasts that a set would have made of a table's last rows, beside what came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import AdaptError
from .forecaster import Forecaster
from .series import Series, Values

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Backtest:
    """Forecasts [n, T, C] (with quantiles [n, T, C, Q]) of windows that end before rows `starts`.

    `errors`: (MSE, MAE) of scaled columns by what made the forecast; rules that learn nothing last.
    """

    series: Series
    starts: list[int]
    forecasts: Values
    truth: Values
    errors: dict[str, tuple[float, float]]


def backtest(forecaster: Forecaster, series: Series, share: float, every: int | None) -> Backtest:
    """Forecast the last `share` of the rows, a window `every` so many rows; None: the horizon.

    Every forecast sees rows before its own only. Raises `AdaptError` for a table that does not fit
    (see `Forecaster`), a share or step out of range, and when no window is left.
    """
    if not 0 < share <= 1:
        raise AdaptError(f"share={share:g} is not allowed: above 0 and up to 1")
    if every is not None and every < 1:
        raise AdaptError(f"every={every} is not allowed: a whole number from 1")
    forecaster.check_columns(series)
    look_back, ahead = forecaster.about.look_back, forecaster.aim.horizon
    first = max(look_back, len(series) - int(share * len(series)))
    starts = list(range(first, len(series) - ahead + 1, every or ahead))
    if not starts:
        raise AdaptError(
            f"the table has {len(series)} rows, {max(0, len(series) - first)} of them to forecast:"
            f" a window of {forecaster.called} is {look_back} and {ahead} rows"
        )
    past = np.stack([series.values[at - look_back : at] for at in starts])
    truth = np.stack([series.values[at : at + ahead] for at in starts])
    forecasts = forecaster.answers(past)
    return Backtest(
        series, starts, forecasts, truth, _errors(forecaster, series, past, truth, forecasts)
    )


def _errors(
    forecaster: Forecaster, series: Series, past: Values, truth: Values, forecasts: Values
) -> dict[str, tuple[float, float]]:
    ahead = truth.shape[1]
    found = {"the set": forecaster.point(forecasts)}
    found["last value"] = np.repeat(past[:, -1:], ahead, axis=1)
    if 1 < series.season <= past.shape[1]:
        found["seasonal naive"] = past[:, -series.season :][:, np.arange(ahead) % series.season]
    scale = 1.0 if forecaster.about.scaler is None else np.array(forecaster.about.scaler.std)
    errors = {name: (each - truth) / scale for name, each in found.items()}
    return {n: (float((e**2).mean()), float(np.abs(e).mean())) for n, e in errors.items()}


def as_frame(found: Backtest, levels: tuple[float, ...], time: str) -> pd.DataFrame:
    """A row for every window, step and column: made (the last row seen), its time, both values.

    `levels`: of the forecasts' last axis, if they are quantiles.
    """
    import pandas as pd

    series, ahead = found.series, found.truth.shape[1]
    when = np.arange(1, len(series) + 1) if series.times is None else series.times
    starts = np.array(found.starts)
    shape = found.truth.shape
    made = np.broadcast_to(when[starts - 1][:, None, None], shape)
    times = np.broadcast_to(when[starts[:, None] + np.arange(ahead)][..., None], shape)
    names = np.broadcast_to(np.array(series.names, object), shape)
    columns = {"made": made, time: times, "column": names}
    if levels:
        columns |= {f"q{level:g}": found.forecasts[..., at] for at, level in enumerate(levels)}
    else:
        columns["forecast"] = found.forecasts
    columns["truth"] = found.truth
    return pd.DataFrame({name: each.ravel() for name, each in columns.items()})
