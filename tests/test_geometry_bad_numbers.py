"""What numbers of 32 bits do not hold, and settings that are none: left out, or one clear line."""

from __future__ import annotations

import math

import pytest
import torch

from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d.alignment import align
from polyadapt.geometry3d.alignment_steps import sweep
from polyadapt.geometry3d.graph import Window
from polyadapt.geometry3d.observations import observe
from polyadapt.geometry3d.oracle import Oracle
from polyadapt.geometry3d.pointmaps import Pair
from polyadapt.geometry3d.predictions import Predictions
from polyadapt.geometry3d.start import start
from polyadapt.geometry3d.trajectory import ate
from polyadapt.geometry3d.weights import Calibrated
from polyadapt.tests.geometry_cases import FOCAL, all_pairs, small_scene

pytestmark = pytest.mark.slow


def _said(views: int = 3) -> Predictions:
    return Oracle(small_scene(views)).predictions(all_pairs(views))


@pytest.mark.parametrize("far", [1e10, 1e18, 1e25])
def test_points_too_far_to_be_squared_do_not_count(far: float) -> None:
    said = _said()
    said.pair.points2[1, 3:9, 3:9] *= far
    said.pair.points1[2, 0, 0] = -far
    found = align(said, steps=5)
    assert ate(found.poses, small_scene(3).poses).rmse < 1e-3
    assert found.weights[1, 1, 3:9, 3:9].max() == 0
    assert found.weights[1, 1, 9:].min() > 0


def test_a_camera_whose_cost_is_no_number_is_one_line_that_names_the_view() -> None:
    said = _said()
    seen = observe(said, Calibrated())
    geometry = start(seen, said.size, None)
    geometry.centres[1] = torch.nan
    with pytest.raises(AdaptError, match=r"^view 1: the alignment's cost is no number: points,"):
        sweep(seen, geometry, 0.1, know_focals=False)


@pytest.mark.parametrize("small", [1e-25, 1e-38])
def test_scenes_too_small_for_their_squares_are_one_line(small: float) -> None:
    said = _said()
    pair = said.pair._replace(points1=said.pair.points1 * small, points2=said.pair.points2 * small)
    with pytest.raises(AdaptError, match=r"are too large or too small for numbers of 32 bits$"):
        align(Predictions(said.edges, pair), steps=5)


def test_confidences_without_bound_are_one_line() -> None:
    said = _said()
    sure = torch.full_like(said.pair.confidence1, 1e30)
    pair = Pair(said.pair.points1, sure, said.pair.points2, sure)
    with pytest.raises(AdaptError, match="too large or too small"):
        align(
            Predictions(said.edges, pair),
            Calibrated("raw"),
            steps=5,
            focals=torch.full((3,), FOCAL),
        )


@pytest.mark.parametrize("focal", [math.nan, math.inf, 0.0, -FOCAL])
def test_focals_that_are_none_are_refused(focal: float) -> None:
    with pytest.raises(AdaptError, match=r"^focals \[.*\]: pixels, above 0 and finite$"):
        align(_said(), steps=1, focals=torch.tensor([FOCAL, focal, FOCAL]))


@pytest.mark.parametrize("mu", [math.nan, math.inf, 0.0, -1.0])
def test_a_mu_that_is_no_length_is_refused(mu: float) -> None:
    with pytest.raises(AdaptError, match=r"^mu = .* is not allowed"):
        Calibrated(mu=mu)


@pytest.mark.parametrize("gate", [math.nan, math.inf])
def test_a_gate_that_is_no_weight_is_refused(gate: float) -> None:
    with pytest.raises(AdaptError, match=r"^gate = .* is not allowed"):
        Calibrated(gate=gate)


@pytest.mark.parametrize("closed", [False, True])
def test_a_window_wider_than_the_film_is_every_pair(closed: bool) -> None:
    images = torch.zeros(4, 3, 8, 8)
    assert torch.equal(Window(10**15, closed).edges(images), all_pairs(4))
