"""Rotations, similarities, cameras and focals: recovered exactly, and by hand where one can."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polyadapt.core import AdaptError
from polyadapt.geometry3d.cameras import (
    camera_points,
    inverse_poses,
    moved,
    pixels_of,
    pose,
    world_points,
)
from polyadapt.geometry3d.focal import focal_of
from polyadapt.geometry3d.rotations import angle_of, rotation_of, vector_of
from polyadapt.geometry3d.similarity import Similarity, fit_robustly, fit_similarity


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _some_similarity(scale: float = 1.7) -> Similarity:
    turn = rotation_of(torch.tensor([0.4, -1.1, 0.3], dtype=torch.float64))
    return Similarity(torch.tensor(scale, dtype=torch.float64), turn, _random(3, seed=9))


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-3, 1.0, 3.0, 3.12, math.pi])
def test_a_rotation_turns_by_the_length_of_its_vector(angle: float) -> None:
    rotation = rotation_of(angle * torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64) / 3)
    assert abs(angle_of(rotation).item() - angle) < 1e-7
    assert (rotation @ rotation.mT - torch.eye(3)).abs().max() < 1e-12
    assert (rotation_of(vector_of(rotation)) - rotation).abs().max() < 1e-7


def test_ten_points_give_back_the_similarity_that_moved_them() -> None:
    source, truth = _random(10, 3), _some_similarity()
    found = fit_similarity(source, truth.apply(source))
    assert (found.scale - truth.scale).abs() < 1e-6
    assert (found.rotation - truth.rotation).abs().max() < 1e-6
    assert (found.translation - truth.translation).abs().max() < 1e-6
    assert (found.inverse().apply(truth.apply(source)) - source).abs().max() < 1e-6


def test_a_mirrored_cloud_is_met_by_a_rotation_and_not_by_the_mirror() -> None:
    source = _random(10, 3)
    found = fit_similarity(source, source * torch.tensor([1.0, 1.0, -1.0]))
    assert abs(torch.linalg.det(found.rotation).item() - 1) < 1e-9


def test_a_fit_without_scale_keeps_the_scale_one() -> None:
    source, truth = _random(10, 3), _some_similarity(scale=1.0)
    found = fit_similarity(source, truth.apply(source), scaled=False)
    assert found.scale == 1
    assert (found.apply(source) - truth.apply(source)).abs().max() < 1e-6


def test_points_of_no_weight_do_not_count() -> None:
    source, truth = _random(10, 3), _some_similarity()
    target = truth.apply(source)
    target[:4] += 100
    found = fit_similarity(source, target, torch.tensor([0.0] * 4 + [1.0] * 6).double())
    assert (found.scale - truth.scale).abs() < 1e-6


def test_points_on_a_line_are_refused() -> None:
    line = torch.linspace(0, 1, 20)[:, None] * torch.tensor([1.0, 2.0, 3.0]) + 5
    with pytest.raises(AdaptError, match="one line"):
        fit_similarity(line, line)
    with pytest.raises(AdaptError, match="2 points"):
        fit_similarity(line, line, torch.tensor([1.0, 1.0] + [0.0] * 18))


def test_a_robust_fit_is_not_moved_by_a_fifth_of_wild_points() -> None:
    source, truth = _random(100, 3), _some_similarity()
    target = truth.apply(source)
    target[:20] += 5 * _random(20, 3, seed=3)
    weights = torch.ones(100, dtype=torch.float64)
    robust, plain = fit_robustly(source, target, weights), fit_similarity(source, target)
    assert (robust.scale - truth.scale).abs() < 1e-4
    assert (plain.scale - truth.scale).abs() > 1e-2


def test_depth_comes_back_from_the_world_to_its_own_pixel() -> None:
    depths = torch.rand(2, 6, 8, dtype=torch.float64) + 1
    focals = torch.tensor([7.0, 9.0], dtype=torch.float64)
    poses = pose(rotation_of(_random(2, 3)), _random(2, 3, seed=1))
    world = world_points(depths, focals, poses)
    back = moved(world, inverse_poses(poses)).flatten(1, 2)
    pixels, depth = pixels_of(back, focals, 6, 8)
    assert (depth - depths.flatten(1)).abs().max() < 1e-12
    assert (pixels.unflatten(1, (6, 8))[0, 2, 5] - torch.tensor([5.5, 2.5])).abs().max() < 1e-9


def test_a_point_behind_the_camera_has_no_pixel() -> None:
    pixels, depth = pixels_of(torch.tensor([[0.0, 0.0, -1.0]]), torch.tensor(5.0), 4, 4)
    assert pixels.isnan().all()
    assert depth == -1


def test_the_focal_of_an_exact_map_is_the_focal_it_was_drawn_with() -> None:
    points = camera_points(torch.rand(24, 32) + 1, torch.tensor(40.0))
    assert abs(focal_of(points).item() / 40 - 1) < 1e-3


def test_a_fifth_of_wild_points_does_not_move_the_focal() -> None:
    points = camera_points(torch.rand(24, 32) + 1, torch.tensor(40.0))
    wild = torch.rand(24, 32) < 0.2
    points[..., :2] = torch.where(wild[..., None], 3 * points[..., :2], points[..., :2])
    assert abs(focal_of(points, steps=50).item() / 40 - 1) < 1e-3


def test_points_that_are_not_there_do_not_count_for_the_focal() -> None:
    points = camera_points(torch.rand(24, 32) + 1, torch.tensor(40.0))
    points[:5] = torch.nan
    points[5:9] *= -1
    assert abs(focal_of(points).item() / 40 - 1) < 1e-3
    with pytest.raises(AdaptError, match="no focal length: 0 of"):
        focal_of(points[:5])
