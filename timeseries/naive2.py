"""Naive2, the forecast that M4 measures others by: the last value, with the season put back."""

from __future__ import annotations

import math

import numpy as np

from ..core.errors import AdaptError
from .series import Values

_TWO_SIDED_90 = 1.645  # quantile of the normal distribution


def naive2(past: Values, period: int, horizon: int) -> Values:
    """The next `horizon` values [T] of a past [rows].

    Where the past is seasonal, it is divided by its multiplicative season, its last value is
    repeated, and the season of each step is multiplied in again; else only repeated.

    As the competition describes it (Makridakis et al., 2020), and from memory of its code: values
    may differ in the last digits from its published forecasts. A past with values that are not
    above 0 has no multiplicative season and counts as not seasonal: that is our choice.

    >>> naive2(np.array([10.0, 30.0] * 8), period=2, horizon=3).round(6).tolist()
    [10.0, 30.0, 10.0]
    """
    if not len(past) or period < 1 or horizon < 1:
        raise AdaptError(f"{len(past)} rows, period={period}, horizon={horizon}: each from 1")
    if not is_seasonal(past, period):
        return np.full(horizon, past[-1])
    indices = season_indices(past, period)
    steps = np.arange(len(past), len(past) + horizon)
    ahead: Values = past[-1] / indices[(len(past) - 1) % period] * indices[steps % period]
    return ahead


def is_seasonal(past: Values, period: int) -> bool:
    """Whether the autocorrelation r_m at a lag of one season m is significant at 90 %.

    |r_m| > 1.645 sqrt((1 + 2 (r_1^2 + ... + r_{m-1}^2)) / n). At least three seasons are needed.
    """
    if period == 1 or len(past) < 3 * period or (past <= 0).any() or past.max() == past.min():
        return False
    away = past - past.mean()
    r = [float(away[lag:] @ away[:-lag] / (away @ away)) for lag in range(1, period + 1)]
    limit = _TWO_SIDED_90 * math.sqrt((1 + 2 * sum(x * x for x in r[:-1])) / len(past))
    return abs(r[-1]) > limit


def season_indices(past: Values, period: int) -> Values:
    """How far above the trend each place of a season is, on average 1: [m], from the first row on.

    The trend is the centred mean over a season (over two halves at the ends where m is even).
    """
    weights = np.ones(period) if period % 2 else np.r_[0.5, np.ones(period - 1), 0.5]
    trend = np.convolve(past, weights / period, mode="valid")
    first = len(weights) // 2
    ratios = past[first : first + len(trend)] / trend
    places = np.arange(first, first + len(trend)) % period
    means = np.array([ratios[places == place].mean() for place in range(period)])
    indices: Values = means / means.mean()
    return indices
