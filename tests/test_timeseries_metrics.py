"""Metrics of competitions and of anomalies, with numbers that one can check by hand."""

from __future__ import annotations

import math
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyadapt.core import AdaptError
from polyadapt.timeseries.metrics import (
    M4_COUNTS,
    Detection,
    aggregated,
    anomaly_threshold,
    areas,
    f1,
    mase,
    naive_error,
    owa,
    point_adjusted,
    smape,
    smape_loss,
)

numbers = st.floats(-1e6, 1e6, width=32)
bits = st.lists(st.booleans(), min_size=1, max_size=40)


def test_smape_is_in_per_cent_and_zero_over_zero_counts_zero() -> None:
    forecast, truth = np.array([[1.0, 0.0], [2.0, 5.0]]), np.array([[3.0, 0.0], [2.0, -5.0]])
    assert smape(forecast, truth) == (100 + 0 + 0 + 200) / 4
    assert smape_loss(torch.from_numpy(forecast), torch.from_numpy(truth)).item() == 75


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20), st.booleans())
def test_the_smape_loss_has_the_value_of_smape_and_a_finite_gradient(
    pairs: list[tuple[float, float]], detached: bool
) -> None:
    forecast, truth = torch.tensor(pairs).unbind(1)
    forecast.requires_grad_()
    loss = smape_loss(forecast, truth, detached)
    loss.backward()
    assert forecast.grad is not None
    assert forecast.grad.isfinite().all()
    both_zero = (forecast == 0) & (truth == 0)
    assert not forecast.grad[both_zero].any()
    expected = smape(forecast.detach().double().numpy(), truth.double().numpy())
    assert math.isclose(loss.item(), expected, rel_tol=1e-5, abs_tol=1e-5)
    assert 0 <= expected <= 200 * (1 + 1e-12)


def test_a_detached_denominator_changes_the_gradient_and_not_the_value() -> None:
    # p = 1, t = 3: d/dp of 200 (3 - p) / 4 is -50; of 200 (3 - p) / (3 + p) it is -75.
    for detached, slope in ((True, -50.0), (False, -75.0)):
        forecast = torch.tensor([1.0], requires_grad=True)
        loss = smape_loss(forecast, torch.tensor([3.0]), detached)
        loss.backward()
        assert loss.item() == 100
        assert forecast.grad is not None
        assert forecast.grad.item() == slope


def test_mase_divides_by_how_far_a_season_ago_was_off() -> None:
    past = np.array([1.0, 2.0, 4.0, 8.0])
    assert naive_error(past, period=1) == (1 + 2 + 4) / 3
    assert naive_error(past, period=2) == (3 + 6) / 2
    assert naive_error(past, period=4) == 0
    forecast, truth = np.array([[1.0, 1.0], [0.0, 0.0]]), np.array([[2.0, 4.0], [6.0, 6.0]])
    assert mase(forecast, truth, np.array([2.0, 3.0])) == (1 + 2) / 2


def test_a_series_with_a_constant_past_is_left_out_of_mase() -> None:
    forecast, truth = np.zeros((2, 1)), np.ones((2, 1))
    assert mase(forecast, truth, np.array([0.0, 4.0])) == 0.25
    assert math.isnan(mase(forecast, truth, np.zeros(2)))


def test_naive2_has_an_owa_of_one() -> None:
    assert owa(13.564, 1.912, 13.564, 1.912) == 1
    assert owa(12.0, 1.5, 10.0, 1.0) == pytest.approx((1.2 + 1.5) / 2)
    assert math.isnan(owa(12.0, 1.5, 0.0, 1.0))
    assert math.isnan(owa(12.0, 1.5, 10.0, math.nan))


def test_m4_is_averaged_by_its_numbers_of_series() -> None:
    assert sum(M4_COUNTS.values()) == 100_000
    table = aggregated(
        {
            "Yearly": 1.0,
            "Quarterly": 2.0,
            "Monthly": 3.0,
            "Weekly": 4.0,
            "Daily": 5.0,
            "Hourly": 6.0,
        }
    )
    assert table["Yearly"] == 1
    assert table["Others"] == pytest.approx((359 * 4 + 4_227 * 5 + 414 * 6) / 5_000)
    assert table["Average"] == pytest.approx(
        (23_000 + 2 * 24_000 + 3 * 48_000 + 359 * 4 + 4_227 * 5 + 414 * 6) / 100_000
    )
    with pytest.raises(AdaptError, match="no number of series for Hour: Yearly, "):
        aggregated({"Hour": 1.0})


def test_f1_counts_steps() -> None:
    found, labels = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 1, 0, 1])
    assert f1(found, labels) == Detection(precision=2 / 3, recall=2 / 3, f1=2 / 3)
    nothing = torch.zeros(5)
    assert f1(nothing, labels) == Detection(0.0, 0.0, 0.0)
    assert f1(nothing, nothing) == Detection(0.0, 0.0, 0.0)


def adjusted_by_hand(found: list[bool], labels: list[bool]) -> list[bool]:
    result = list(found)
    for label, run in groupby(range(len(labels)), key=lambda i: labels[i]):
        places = list(run)
        if label and any(found[i] for i in places):
            for i in places:
                result[i] = True
    return result


@settings(deadline=None)
@given(bits, st.data())
def test_point_adjustment_counts_a_run_whole_by_one_hit(
    labels: list[bool], data: st.DataObject
) -> None:
    size = len(labels)
    found = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    adjusted = point_adjusted(torch.tensor(found), torch.tensor(labels))
    assert adjusted.tolist() == adjusted_by_hand(found, labels)


def test_random_scores_look_strong_after_point_adjustment() -> None:
    labels = torch.zeros(10_000).bool()
    labels[4_000:5_000] = True  # one run of a tenth
    found = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) > 0.99
    assert f1(found, labels).f1 < 0.05
    assert f1(point_adjusted(found, labels), labels).f1 > 0.9


def test_the_threshold_is_a_quantile_of_training_scores_alone() -> None:
    train, test = torch.arange(101.0), torch.full((101,), 1_000.0)
    assert anomaly_threshold(train, 0.01) == 99
    assert anomaly_threshold(train, 0.01, test) == 1_000  # the published code's: it saw the test
    assert anomaly_threshold(train.view(1, -1), 0.5) == 50
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(AdaptError, match="of anomalies is not allowed"):
            anomaly_threshold(train, share)
    with pytest.raises(AdaptError, match="no score"):
        anomaly_threshold(torch.zeros(0), 0.5)


def counted(scores: Tensor, labels: Tensor) -> float:
    """The share of (anomaly, normal) pairs that the scores order rightly, ties by half."""
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None]
    return float(((pairs > 0).double() + 0.5 * (pairs == 0)).mean())


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_the_roc_area_is_the_share_of_pairs_in_the_right_order(
    steps: list[tuple[int, bool]],
) -> None:
    scores = torch.tensor([1e3 * score for score, _ in steps])  # a sigmoid would make them all 1
    labels = torch.tensor([int(label) for _, label in steps])
    if len(labels.unique()) < 2:
        with pytest.raises(AdaptError, match="all steps are of one kind"):
            areas(scores, labels)
        return
    assert areas(scores, labels).roc == pytest.approx(counted(scores, labels))


def test_areas_of_four_steps() -> None:
    # By falling score: anomaly, normal, anomaly, normal. Precision 1 and 2/3 at recall 1/2 and 1.
    found = areas(torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([1, 0, 1, 0]))
    assert found.roc == 0.75
    assert found.precision_recall == pytest.approx((1 + 2 / 3) / 2)
