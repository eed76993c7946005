"""Scores of cameras, surfaces, depths and focals: hand-checkable cases and independent ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d.pointmaps import Pair
from polyadapt.geometry3d.scenes.rooms import room
from polyadapt.geometry3d.surfaces import surface_error
from polyadapt.geometry3d.trajectory import area, ate, pair_errors, rpe
from polyadapt.geometry3d.view_scores import depth_error, focal_error, point_error, true_pairs
from polyadapt.tests.pose_cases import course, drifted, transformed, turned


def test_the_ate_is_the_residual_of_the_best_similarity() -> None:
    found, y = ate(drifted(), course()), course()[:, :3, 3].numpy()
    x = drifted()[:, :3, 3].numpy()
    a, b = x - x.mean(0), y - y.mean(0)
    rotation, _ = Rotation.align_vectors(b, a)  # independent of our Umeyama
    turned = rotation.apply(a)
    scale = (turned * b).sum() / (a * a).sum()
    assert found.rmse == pytest.approx(np.sqrt(((scale * turned - b) ** 2).sum(1).mean()), rel=1e-9)
    assert float(found.alignment.scale) == pytest.approx(scale, rel=1e-9)
    assert found.views == 40
    assert not found.straight


def test_the_numbers_are_those_of_evo() -> None:
    """Of evo 1.38.1 (GPL-3, no dependency, not even here), run once on these two trajectories."""
    found = ate(drifted(), course())
    assert found.rmse == pytest.approx(0.0549204662213453, abs=1e-9)
    assert found.median == pytest.approx(0.05356093839147404, abs=1e-9)
    assert ate(drifted(), course(), scaled=False).rmse == pytest.approx(1.846708950219809, abs=1e-9)
    steps = rpe(drifted(), course(), scale=float(found.alignment.scale))
    assert steps.translation == pytest.approx(0.060954810746285414, abs=1e-9)
    assert steps.rotation == pytest.approx(2.6128492074699428, abs=1e-7)


def test_a_similarity_of_the_estimate_leaves_the_ate_and_a_scale_shows_without_scaling() -> None:
    base, moved = ate(drifted(), course()), ate(transformed(drifted(), 7.0), course())
    assert moved.rmse == pytest.approx(base.rmse, abs=1e-9)
    assert ate(transformed(course(), 1.0), course(), scaled=False).rmse < 1e-9
    assert ate(transformed(course(), 2.0), course(), scaled=False).rmse > 1


def test_motion_on_a_line_is_reported_and_scored() -> None:
    truth = torch.eye(4).repeat(5, 1, 1)
    truth[:, 2, 3] = torch.arange(5.0)
    estimate = truth.clone()
    estimate[:, 2, 3] = 3 * torch.tensor([0.0, 1, 2, 3, 5])
    found = ate(estimate, truth)
    assert found.straight
    # The best fit of 0..4 by 0, 1, 2, 3, 5: slope 12 / 14.8, residual sum 10 - 144 / 14.8.
    assert found.rmse == pytest.approx(((10 - 144 / 14.8) / 5) ** 0.5, rel=1e-6)


def test_cameras_that_stand_still_have_no_trajectory() -> None:
    still = torch.eye(4).repeat(3, 1, 1)
    with pytest.raises(AdaptError, match="stand in one place"):
        ate(still, still)
    # An estimate that stands still is wrong by the truth's spread: sqrt(mean of 1, 0, 1).
    truth = still.clone()
    truth[:, 0, 3] = torch.tensor([-1.0, 0, 1])
    assert ate(still, truth).rmse == pytest.approx((2 / 3) ** 0.5)


def test_relative_errors_of_steps_are_those_of_one_step_off() -> None:
    truth = torch.eye(4, dtype=torch.float64).repeat(4, 1, 1)
    truth[:, 0, 3] = torch.arange(4)
    estimate = turned(truth, 10)  # every step's rotation is off by 10 degrees
    estimate[3, 0, 3] += 0.3
    found = rpe(estimate, truth)
    assert found.rotation == pytest.approx(10)
    # The turned second camera sees the third 2 sin(5 degrees) off, and itself is seen rightly.
    chord = (2 * np.sin(np.radians(5))) ** 2
    assert found.translation == pytest.approx(np.sqrt((0 + chord + 0.3**2) / 3))
    assert rpe(truth, truth, delta=2).translation == 0


def test_exact_poses_have_the_whole_area() -> None:
    found = pair_errors(transformed(course(), 3.0), course())
    assert found.auc(30) == 1
    assert found.rra(5) == found.rta(5) == 1
    assert found.skipped == 0


def test_a_constant_error_counts_from_the_next_whole_degree_on() -> None:
    assert area(torch.full((7,), 15.0)) == pytest.approx(15 / 30)  # strictly below 16 .. 30
    assert area(torch.full((7,), 14.9)) == pytest.approx(16 / 30)
    assert area(torch.tensor([0.0, 30.0])) == 0.5


def test_pairs_of_turned_cameras_are_off_by_the_turn() -> None:
    found = pair_errors(turned(course(4), 20.5), course(4))
    # Of 12 ordered pairs, 8 have one turned camera; their direction too, seen from a turned one.
    assert found.rra(20) == pytest.approx(4 / 12)
    assert found.rra(21) == 1
    assert 0 < found.rta(1) < 1
    assert found.auc(30) < 1


def test_relative_scores_do_not_depend_on_the_frame_or_the_order_of_views() -> None:
    base = pair_errors(drifted(8), course(8))
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    shuffled = pair_errors(drifted(8)[order], course(8)[order])
    moved = pair_errors(drifted(8), transformed(course(8), 1.0))
    for other in (shuffled, moved):
        for name in ("rotation", "translation"):
            mine, its = (getattr(x, name).sort().values for x in (base, other))
            torch.testing.assert_close(mine, its, atol=1e-6, rtol=0)
        assert other.auc(30) == pytest.approx(base.auc(30))


def test_pairs_without_a_baseline_are_skipped_and_counted() -> None:
    truth = course(3)
    truth[1, :3, 3] = truth[0, :3, 3]
    found = pair_errors(truth, truth)
    assert found.skipped == 2
    assert found.rta(1) == found.auc() == 1
    # The estimate sees no baseline where there is one: 180 degrees, both ways.
    lost = course(3)
    lost[1, :3, 3] = lost[0, :3, 3]
    wrong = pair_errors(lost, course(3))
    assert (wrong.translation == 180).sum() == 2
    with pytest.raises(AdaptError, match="one view"):
        pair_errors(truth[:1], truth[:1])


def test_poses_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(AdaptError, match=r"\[3, 4, 4\] cannot be compared with true poses \[4, 4"):
        ate(course(3), course(4))
    with pytest.raises(AdaptError, match="not finite"):
        pair_errors(course(3) * torch.nan, course(3))
    with pytest.raises(AdaptError, match="steps of 3 views"):
        rpe(course(3), course(3), delta=3)


def _plane(shift: float = 0.0) -> torch.Tensor:
    grid = torch.cartesian_prod(torch.linspace(0, 1, 40), torch.linspace(0, 1, 40))
    return torch.cat([grid, torch.full((1600, 1), shift)], 1)


def test_a_cloud_is_exact_and_complete_to_itself() -> None:
    found = surface_error(_plane(), _plane())
    assert (found.accuracy, found.completeness, found.chamfer) == (0, 0, 0)


def test_a_part_of_a_surface_is_exact_and_incomplete() -> None:
    found = surface_error(_plane()[:800], _plane())
    assert found.accuracy == 0
    assert found.completeness > 0.1
    assert found.completeness_median < found.completeness
    assert found.chamfer == found.completeness / 2


def test_a_plane_shifted_along_its_normal_is_off_by_the_shift_both_ways() -> None:
    found = surface_error(_plane(0.01), _plane())
    assert found.accuracy == pytest.approx(0.01, rel=1e-5)
    assert found.completeness_median == pytest.approx(0.01, rel=1e-5)
    assert surface_error(_plane(0.01), _plane(), most=100).accuracy == pytest.approx(0.01, rel=1e-3)


def test_clouds_without_points_are_refused() -> None:
    with pytest.raises(AdaptError, match=r"estimated points are \[0, 3\]"):
        surface_error(torch.zeros(0, 3), _plane())
    with pytest.raises(AdaptError, match="true points that are not finite"):
        surface_error(_plane(), _plane(torch.inf))


def test_depths_are_scored_after_their_scale() -> None:
    truth = torch.tensor([1.0, 2, 3, 4, 0])
    found = depth_error(torch.tensor([0.5, 1, 1.5, 1, 9]), truth)
    # Medians 2 and 1 (the lower ones): scale 2; the fourth is 2 instead of 4, the fifth unmeasured.
    assert (found.scale, found.delta) == (2, 0.75)
    assert found.abs_rel == pytest.approx(0.5 / 4)
    squares = depth_error(truth / 5, truth, "least_squares")
    assert (squares.abs_rel, squares.scale) == pytest.approx((0, 5), abs=1e-6)
    assert depth_error(1.3 * truth, truth, "none").delta == 0
    with pytest.raises(AdaptError, match="no pixel"):
        depth_error(-truth, truth)
    with pytest.raises(AdaptError, match=r"\[4\] cannot be scored by \[5\]"):
        depth_error(truth[:4], truth)


def test_focals_are_scored_in_per_cent_and_in_pixels() -> None:
    assert focal_error(torch.tensor([90.0, 220]), torch.tensor([100.0, 200])) == (10, 15)
    with pytest.raises(AdaptError, match="cannot be scored"):
        focal_error(torch.ones(2), torch.ones(3))


def test_true_pairs_score_zero_whatever_their_scale() -> None:
    scene = room(0, "moving", views=3)
    truth = true_pairs(scene, torch.tensor([[0, 1], [2, 0]]))
    exact = point_error(Pair(3 * truth[0], truth[1], 3 * truth[2], truth[3]), truth)
    assert max(exact.own.max(), exact.other.max()) < 1e-5
    # The second view's points are those of the world, seen from the first camera.
    world = truth.points2[0] @ scene.poses[0, :3, :3].T + scene.poses[0, :3, 3]
    torch.testing.assert_close(world, scene.points()[1], atol=1e-4, rtol=0)


def test_a_pair_error_is_the_mean_distance_over_valid_pixels() -> None:
    one = torch.ones(1, 2, 2)
    points = torch.tensor([0.0, 0, 2]).expand(1, 2, 2, 3)
    off = points.clone()
    off[0, 0, 0] = torch.tensor([0.0, 2, 0])  # as far away, 2 sqrt(2) aside
    found = point_error(Pair(points, one, off, one), Pair(points, one, points, one))
    assert (found.own.item(), found.size.item()) == (0, 2)
    assert found.other.item() == pytest.approx(2 * 2**0.5 / 4)
    hidden = one.clone()
    hidden[0, 0, 0] = 0
    found = point_error(Pair(points, one, off, one), Pair(points, one, points, hidden))
    assert found.other.item() == 0
