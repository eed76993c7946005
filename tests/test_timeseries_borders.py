"""Borders and scaler: the integers that the benchmarks publish, and the rules behind them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyadapt.core import AdaptError
from polyadapt.timeseries import borders
from polyadapt.timeseries.borders import Borders
from polyadapt.timeseries.data import BENCHMARKS
from polyadapt.timeseries.scaling import Scaler

ETTH, ETTM = 17_420, 69_680


def counts(cut: Borders, look_back: int, horizon: int) -> list[int]:
    return [borders.windows(part, look_back, horizon) for part in (cut.train, cut.val, cut.test)]


def test_ett_is_cut_after_12_16_and_20_months_of_30_days() -> None:
    hourly = borders.ett(ETTH, look_back=336)
    assert hourly == Borders(range(8640), range(8304, 11520), range(11184, 14400))
    assert ETTH - hourly.test.stop == 3020  # never used
    quarters = borders.ett(ETTM, look_back=512, rows_per_hour=4)
    assert [part.stop for part in (quarters.train, quarters.val, quarters.test)] == [
        34_560,
        46_080,
        57_600,
    ]


@pytest.mark.parametrize(
    ("rows", "per_hour", "look_back", "horizon", "published"),
    [
        (ETTH, 1, 336, 96, [8_209, 2_785, 2_785]),
        (ETTH, 1, 336, 720, [7_585, 2_161, 2_161]),
        (ETTM, 4, 512, 96, [33_953, 11_425, 11_425]),
    ],
)
def test_ett_has_the_published_numbers_of_windows(
    rows: int, per_hour: int, look_back: int, horizon: int, published: list[int]
) -> None:
    assert counts(borders.ett(rows, look_back, per_hour), look_back, horizon) == published


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Weather", [36_887, 5_270, 10_539]),
        ("Electricity", [18_412, 2_632, 5_260]),
        ("Traffic", [12_280, 1_756, 3_508]),
        ("ILI", [676, 97, 193]),
        ("Exchange", [5_311, 760, 1_517]),
    ],
)
def test_the_other_benchmarks_are_cut_as_published(name: str, published: list[int]) -> None:
    cut = borders.shares(BENCHMARKS[name].rows, look_back=96)
    assert [len(cut.train), len(cut.val) - 96, len(cut.test) - 96] == published
    assert cut.train.stop == cut.val.start + 96
    assert cut.val.stop == cut.test.start + 96


def test_the_test_of_ili_has_134_windows_at_the_longest_horizon() -> None:
    assert counts(borders.shares(966, look_back=104), 104, 60)[2] == 134


def test_few_shots_keep_the_earliest_rows_behind_the_first_look_back() -> None:
    whole = borders.ett(ETTH, look_back=336)
    for share, percent in ((0.05, 5), (0.1, 10), (0.07, 7)):
        assert borders.few(whole, share, 336).train.stop == (8640 - 336) * percent // 100 + 336
    assert borders.few(whole, 0.05, 336).test == whole.test
    assert borders.few(whole, 1.0, 336) == whole


def test_few_shots_leave_no_window_where_the_papers_report_none() -> None:
    etth = borders.few(borders.ett(ETTH, look_back=336), 0.05, 336)
    assert counts(etth, 336, 336)[0] == 80
    assert counts(etth, 336, 720)[0] == 0
    ili = borders.few(borders.shares(966, look_back=104), 0.05, 104)
    assert [counts(ili, 104, horizon)[0] for horizon in (24, 36, 48, 60)] == [5, 0, 0, 0]


@settings(deadline=None)
@given(st.integers(10, 5000), st.integers(1, 300), st.integers(1, 300))
def test_no_window_forecasts_a_row_of_another_part(rows: int, look_back: int, horizon: int) -> None:
    if look_back > int(rows * 0.7):
        with pytest.raises(AdaptError, match="longer than the"):
            borders.shares(rows, look_back)
        return
    cut = borders.shares(rows, look_back)
    forecast = [
        {
            start + look_back + step
            for start in range(part.start, part.start + borders.windows(part, look_back, horizon))
            for step in (0, horizon - 1)
        }
        for part in (cut.train, cut.val, cut.test)
    ]
    assert not forecast[0] & forecast[1]
    assert not forecast[1] & forecast[2]
    assert max(set().union(*forecast), default=0) < rows


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda: borders.ett(14_399, 96), "14399 rows: ETT's borders need 14400"),
        (lambda: borders.ett(ETTH, 96, rows_per_hour=4), "17420 rows: ETT's borders need 57600"),
        (lambda: borders.ett(ETTH, 9000), "look_back=9000 is longer than the 8640 rows"),
        (lambda: borders.shares(100, 10, train=0.9), "train=0.9, test=0.2"),
        (lambda: borders.few(borders.shares(100, 10), 0.0, 10), "few=0 is not allowed"),
        (lambda: borders.few(borders.shares(100, 10), 1.5, 10), "few=1.5 is not allowed"),
    ],
)
def test_borders_that_cannot_be_are_refused(asked: object, said: str) -> None:
    assert callable(asked)
    with pytest.raises(AdaptError, match=said):
        asked()


def test_the_scaler_divides_by_the_population_deviation() -> None:
    scaler = Scaler.of(np.array([[0.0], [0.0], [4.0], [4.0]]))
    assert scaler == Scaler((2.0,), (2.0,))  # the sample's would be 2.309
    assert scaler.apply(np.array([[6.0]])).item() == 2.0


def test_a_constant_channel_becomes_zero_exactly() -> None:
    values = np.full((1000, 1), 0.1)
    assert values.std() > 0  # of a rounded sum
    scaler = Scaler.of(values)
    assert scaler == Scaler((0.1,), (1.0,))
    assert not scaler.apply(values).any()


@settings(deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30),
    st.floats(-1e6, 1e6),
)
def test_a_scaler_undoes_what_it_applies_also_after_json(past: list[float], new: float) -> None:
    scaler = Scaler.of(np.array(past)[:, None])
    again = Scaler.from_json(json.loads(json.dumps(scaler.to_json())))
    assert again == scaler
    undone = again.undo(again.apply(np.array([[new]]))).item()
    assert math.isclose(undone, new, rel_tol=1e-9, abs_tol=1e-9 * (1 + abs(scaler.mean[0])))


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(AdaptError, match="3 channels: the scaler knows 1"):
        Scaler((0.0,), (1.0,)).apply(np.zeros((4, 3)))


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"mean": [0.0]},
        {"mean": [0.0], "std": [0.0]},
        {"mean": [0.0], "std": [1.0, 1.0]},
        {"mean": [math.nan], "std": [1.0]},
        {"mean": "0", "std": "1"},
        {"mean": [], "std": []},
    ],
)
def test_a_damaged_scaler_is_refused(record: dict[str, object]) -> None:
    with pytest.raises(AdaptError, match="not a scaler"):
        Scaler.from_json(record)
