"""Naive2: exact where a season repeats itself, the last value elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from polyadapt.core import AdaptError
from polyadapt.timeseries.naive2 import is_seasonal, naive2, season_indices


@pytest.mark.parametrize("period", [2, 3, 4, 12])
def test_naive2_continues_a_season(period: int) -> None:
    season = np.arange(1.0, period + 1)
    past = np.tile(season, 12)[: 12 * period - 1]  # ends within a season
    assert is_seasonal(past, period)
    assert season_indices(past, period) == pytest.approx(season / season.mean())
    ahead = naive2(past, period, horizon=2 * period)
    assert ahead == pytest.approx(np.tile(season, 3)[period - 1 : 3 * period - 1])
    assert naive2(7 * past, period, 2) == pytest.approx(7 * ahead[:2])


@pytest.mark.parametrize(
    ("past", "period", "why"),
    [
        ([1.0, 3.0] * 2, 2, "less than three seasons"),
        ([5.0] * 12, 2, "constant"),
        ([1.0, 3.0] * 6, 1, "a season of one row"),
        ([0.0, 3.0] * 6, 2, "not above 0, so it has no multiplicative season"),
        ([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0], 3, "growth alone"),
    ],
)
def test_naive2_repeats_the_last_value_without_a_season(
    past: list[float], period: int, why: str
) -> None:
    assert naive2(np.array(past), period, 3).tolist() == [past[-1]] * 3, why


def test_naive2_needs_a_past_a_season_and_a_horizon() -> None:
    for past, period, horizon in ((0, 1, 1), (4, 0, 1), (4, 1, 0)):
        with pytest.raises(AdaptError, match=f"{past} rows, period={period}, horizon={horizon}"):
            naive2(np.ones(past), period, horizon)
