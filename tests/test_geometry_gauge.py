"""The unit of an alignment: pairs that have lost their weight must not carry it away."""

from __future__ import annotations

import pytest
import torch

from polyadapt.geometry3d.alignment import align
from polyadapt.geometry3d.oracle import Flaws, Oracle
from polyadapt.geometry3d.predictions import Predictions
from polyadapt.geometry3d.trajectory import ate
from polyadapt.geometry3d.weights import Calibrated
from polyadapt.tests.geometry_cases import all_pairs, small_scene

pytestmark = pytest.mark.slow


def _with_nonsense(said: Predictions, wrong: list[int]) -> Predictions:
    """Some pairs say, as surely as the others, what has nothing to do with the scene."""
    chance = torch.Generator().manual_seed(0)
    for points in (said.pair.points1, said.pair.points2):
        points[wrong] = torch.randn(points[wrong].shape, generator=chance) + torch.tensor([0, 0, 3])
    return said


@pytest.mark.parametrize("rule", [Calibrated(), Calibrated("raw")], ids=["log", "raw"])
def test_a_pair_that_is_nonsense_keeps_a_scale_and_leaves_the_scene_alone(rule: Calibrated) -> None:
    scene = small_scene(4)
    said = Oracle(scene, Flaws(noise=0.01)).predictions(all_pairs(4))
    found = align(_with_nonsense(said, [3]), rule, steps=50)
    scales = found.similarities.scale
    assert scales.min() > 0.01
    assert scales.max() < 10
    assert found.weights[[3]].mean() < 0.05 * found.weights.mean()
    assert ate(found.poses, scene.poses).rmse < 0.05
