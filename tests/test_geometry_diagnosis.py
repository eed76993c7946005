"""Spread over partners and common bias: measured with the truth, guessed without it."""

from __future__ import annotations

import math

import pytest

from polyadapt.geometry3d.alignment import align
from polyadapt.geometry3d.diagnosis import Diagnosis, diagnose, diagnose_with
from polyadapt.geometry3d.oracle import Flaws, Oracle
from polyadapt.geometry3d.weights import Fixed
from polyadapt.tests.geometry_cases import all_pairs, small_scene


@pytest.mark.parametrize(("noise", "common"), [(0.1, 0.0), (0.1, 0.05), (0.05, 0.1)])
def test_the_truth_tells_spread_and_bias_apart(noise: float, common: float) -> None:
    scene = small_scene(6)
    said = Oracle(scene, Flaws(noise=noise, common=common)).predictions(all_pairs(6))
    found = diagnose_with(said, scene)
    assert found.spread == pytest.approx(noise, rel=0.15)
    assert found.bias == pytest.approx(common, rel=0.15, abs=0.025)  # fits leave some of the noise
    assert found.known


@pytest.mark.parametrize(("noise", "common"), [(0.1, 0.0), (0.1, 0.1), (0.0, 0.1)])
def test_without_the_truth_the_spread_is_found_and_the_bias_guessed(
    noise: float, common: float
) -> None:
    scene = small_scene(6)
    said = Oracle(scene, Flaws(noise=noise, common=common)).predictions(all_pairs(6))
    found = diagnose(said, align(said, Fixed(), steps=20))
    assert found.spread == pytest.approx(noise, rel=0.15, abs=0.005)
    assert found.bias == pytest.approx(common, rel=0.5, abs=0.03)
    assert not found.known


def test_the_gain_follows_the_rule_and_a_low_ratio_is_said() -> None:
    even = Diagnosis(spread=0.1, bias=0.1, known=True)
    assert even.predicted_gain == pytest.approx(1 - 1 / math.sqrt(2))
    assert "predicted gain 29%" in str(even)
    assert "little to learn" not in str(even)
    # The plain small network of the trials: as good as monocular.
    alike = Diagnosis(spread=0.007, bias=0.161, known=False)
    assert alike.predicted_gain < 0.001
    assert "contradict each other" in str(alike)
    assert "below 0.3 leaves calibration little to learn from" in str(alike)
    hidden = Diagnosis(spread=0.1, bias=0.0, known=False)
    assert str(hidden).endswith("common bias not seen beside it: no gain can be predicted")
    assert "predicted gain 100%" in str(Diagnosis(spread=0.1, bias=0.0, known=True))
    assert Diagnosis(spread=0.1, bias=0.0, known=False).predicted_gain == 1
