"""By which length the weights of an alignment fall, and that they are what the formula says."""

from __future__ import annotations

import pytest
import torch

from polyadapt.geometry3d.alignment import align
from polyadapt.geometry3d.oracle import Flaws, Oracle
from polyadapt.geometry3d.predictions import Predictions
from polyadapt.geometry3d.weights import Calibrated, Fixed
from polyadapt.tests.geometry_cases import all_pairs, small_scene

pytestmark = pytest.mark.slow


def _noisy() -> Predictions:
    return Oracle(small_scene(3), Flaws(noise=0.1)).predictions(all_pairs(3))


def test_mu_is_the_median_residual_at_the_first_refresh_and_then_stays() -> None:
    said: list[float] = []
    found = align(
        _noisy(), steps=11, refresh=4, progress=lambda done, of, median: said.append(median)
    )
    assert len({*said}) == 3  # before the sweeps 1, 5 and 9
    assert found.mu == said[4]


@pytest.mark.parametrize("space", ["log", "raw"])
def test_an_alignments_weights_are_the_closed_form_of_its_residuals(space: str) -> None:
    said = _noisy()
    sure = torch.stack([said.pair.confidence1, said.pair.confidence2], 1)
    rule = Calibrated("raw" if space == "raw" else "log")
    initial = sure if space == "raw" else sure.log()
    initial = torch.where(initial < 0.5, 0.0, initial)
    found = align(said, rule, steps=5, refresh=2)
    wanted = initial / (1 + found.residuals / found.mu) ** 2
    assert (found.weights - wanted).abs().max() < 1e-5 * initial.max()
    assert (found.weights < 0.9 * initial).float().mean() > 0.5  # they have fallen


def test_fixed_weights_are_the_logarithms_of_the_confidences_in_the_end() -> None:
    said = _noisy()
    sure = torch.stack([said.pair.confidence1, said.pair.confidence2], 1)
    found = align(said, Fixed(), steps=5, refresh=2)
    assert (found.weights - sure.log()).abs().max() < 1e-6
