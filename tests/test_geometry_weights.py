"""Calibrated weights: the closed form, by hand and against a search."""

from __future__ import annotations

import pytest
import torch

from polyadapt.core import AdaptError
from polyadapt.geometry3d.weights import Calibrated, Fixed, calibrated, in_space, reduced_cost


def test_a_weight_falls_to_a_quarter_at_mu_and_to_a_sixteenth_at_three() -> None:
    found = calibrated(torch.tensor(4.0).double(), torch.tensor([0.0, 0.1, 0.3]).double(), 0.1)
    assert (found - torch.tensor([4.0, 1.0, 0.25]).double()).abs().max() < 1e-6


@pytest.mark.parametrize(("initial", "residual"), [(4.0, 0.0), (4.0, 0.07), (0.6, 0.3), (1.5, 2.0)])
def test_no_weight_of_a_fine_grid_costs_less_than_the_closed_form(
    initial: float, residual: float
) -> None:
    mu, C = 0.1, torch.tensor(initial).double()
    e = torch.tensor(residual).double()
    grid = torch.linspace(0, initial, 200_001).double()
    costs = grid * e + mu * (grid.sqrt() - C.sqrt()) ** 2
    w = calibrated(C, e, mu)
    found = w * e + mu * (w.sqrt() - C.sqrt()) ** 2
    assert found <= costs.min() + 1e-12
    assert (grid[costs.argmin()] - w).abs() < 1e-4
    assert (found - reduced_cost(C, e, mu)).abs() < 1e-12


def test_a_weight_never_exceeds_its_start_and_falls_with_the_residual() -> None:
    residual = torch.linspace(0, 3, 100).double()
    found = calibrated(torch.tensor(2.5).double(), residual, 0.2)
    assert (found <= 2.5).all()
    assert (found.diff() < 0).all()


def test_the_unit_of_length_does_not_change_a_weight() -> None:
    initial, residual = torch.rand(50).double() + 1, torch.rand(50).double()
    one, other = calibrated(initial, residual, 0.2), calibrated(initial, 7 * residual, 1.4)
    assert (one - other).abs().max() < 1e-12


def test_the_gate_cuts_confidences_below_1_65_in_log_space_and_none_in_raw_space() -> None:
    confidence = torch.tensor([1.01, 1.64, 1.66, 5.0])
    assert (Calibrated("log").initial(confidence) > 0).tolist() == [False, False, True, True]
    assert (Calibrated("raw").initial(confidence) > 0).all()
    assert torch.equal(Calibrated("raw").initial(confidence), confidence)


def test_fixed_weights_stay_what_they_are() -> None:
    initial = Fixed().initial(torch.tensor([1.0, torch.e]))
    assert initial.tolist() == pytest.approx([0, 1], abs=1e-6)
    assert Fixed().refreshed(initial, torch.ones(2), 0.1) is initial


def test_a_confidence_that_is_no_number_weighs_nothing() -> None:
    broken = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert in_space(broken, "log").tolist() == [0, 0, 0]
    assert in_space(broken, "raw").tolist() == [0, 0, 0]


def test_what_is_not_a_rule_is_said_in_one_line() -> None:
    with pytest.raises(AdaptError, match="log or raw"):
        in_space(torch.ones(2), "exp")  # type: ignore[arg-type]
    with pytest.raises(AdaptError, match="mu = 0"):
        Calibrated(mu=0)
