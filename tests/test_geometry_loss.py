"""Labels and the loss on them: scales that do not matter, pixels that do not count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyadapt.core import AdaptError
from polyadapt.geometry3d.alignment import Alignment, align
from polyadapt.geometry3d.cameras import moved, pixels_of, world_points
from polyadapt.geometry3d.labels import Labels, pseudo_labels, true_labels, usual_cut
from polyadapt.geometry3d.loss import confidence_loss, distances
from polyadapt.geometry3d.oracle import Flaws, Oracle
from polyadapt.geometry3d.pointmaps import Pair
from polyadapt.geometry3d.similarity import Similarity
from polyadapt.tests.geometry_cases import all_pairs, small_scene


def _case() -> tuple[Pair, Labels]:
    chance = torch.Generator().manual_seed(0)
    one, two, three, four = torch.randn(4, 2, 5, 6, 3, generator=chance, dtype=torch.float64)
    sure = 1 + torch.rand(2, 2, 5, 6, generator=chance, dtype=torch.float64)
    valid = torch.rand(2, 2, 5, 6, generator=chance) < 0.8
    return Pair(one, sure[0], two, sure[1]), Labels(three, valid[0], four, valid[1])


def test_the_loss_of_one_pixel_can_be_done_by_hand() -> None:
    def at(*xyz: float) -> Tensor:
        return torch.tensor(xyz).view(1, 1, 1, 3)

    # Mean distances: predicted (1 + 3) / 2 = 2, labelled (2 + 2) / 2 = 2.
    yes, sure = torch.ones(1, 1, 1).bool(), torch.full((1, 1, 1), torch.e)
    pair = Pair(at(0, 0, 1), sure, at(0, 0, 3), sure)
    labels = Labels(at(0, 0, 2), yes, at(0, 0, 2), yes)
    assert [d.item() for d in distances(pair, labels)] == [0.5, 0.5]
    assert confidence_loss(pair, labels).item() == pytest.approx(torch.e - 0.4, abs=1e-6)


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_neither_the_scale_of_the_prediction_nor_of_the_labels_changes_the_loss(
    scale: float,
) -> None:
    pair, labels = _case()
    loss = confidence_loss(pair, labels)
    bigger = pair._replace(points1=scale * pair.points1, points2=scale * pair.points2)
    wider = labels._replace(points1=scale * labels.points1, points2=scale * labels.points2)
    assert (confidence_loss(bigger, labels) - loss).abs() < 1e-9
    assert (confidence_loss(pair, wider) - loss).abs() < 1e-9


def test_a_perfect_prediction_costs_minus_a_fifth_of_the_log_confidence_of_each_view() -> None:
    pair, labels = _case()
    perfect = pair._replace(points1=labels.points1, points2=labels.points2)
    sure = pair.confidence1[labels.valid1].log(), pair.confidence2[labels.valid2].log()
    wanted = -0.2 * (sure[0].mean() + sure[1].mean())
    assert (confidence_loss(perfect, labels) - wanted).abs() < 1e-12


def test_pixels_without_a_label_change_neither_loss_nor_gradient_even_as_nan() -> None:
    pair, labels = _case()
    points = pair.points1.clone().masked_fill(~labels.valid1[..., None], torch.nan)
    points.requires_grad_()
    loss = confidence_loss(pair._replace(points1=points), labels)
    loss.backward()
    assert (loss - confidence_loss(pair, labels)).abs() < 1e-12
    assert points.grad is not None
    assert points.grad.isfinite().all()
    assert (points.grad[~labels.valid1] == 0).all()


def test_a_pair_without_any_label_costs_nothing() -> None:
    pair, labels = _case()
    none = labels._replace(valid1=labels.valid1 & False, valid2=labels.valid2 & False)
    assert confidence_loss(pair, none) == 0


def test_the_scale_has_a_gradient_so_that_stretching_a_map_has_none() -> None:
    pair, labels = _case()
    stretch = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    scaled = pair._replace(points1=stretch * pair.points1, points2=stretch * pair.points2)
    confidence_loss(scaled, labels).backward()
    assert stretch.grad is not None
    assert stretch.grad.abs() < 1e-12


def test_a_pseudo_label_lies_on_its_own_pixel_at_the_aligned_depth() -> None:
    scene = small_scene(4)
    found = align(Oracle(scene, Flaws(noise=0.05)).predictions(all_pairs(4)), steps=10)
    labels = pseudo_labels(found, cut=0.1)
    first, second = found.edges.T
    assert (labels.points1[..., 2] - found.depths[first]).abs().max() == 0
    world = moved(labels.points2, found.poses[first])
    direct = world_points(found.depths, found.focals, found.poses)[second]
    assert (world - direct).abs().max() < 1e-4
    height, width = found.depths.shape[1:]
    pixels, _ = pixels_of(labels.points1.flatten(1, 2), found.focals[first], height, width)
    corner = pixels.unflatten(1, (height, width))[:, 3, 7]
    assert (corner - torch.tensor([7.5, 3.5])).abs().max() < 1e-3


def _by_hand(weights: list[float], residuals: list[float], mu: float) -> Alignment:
    """Two views of one pixel: what the pairs (0, 1) and (1, 0) have of both."""
    eye = torch.eye(4).repeat(2, 1, 1)
    return Alignment(
        poses=eye,
        focals=torch.ones(2),
        depths=torch.ones(2, 1, 1),
        edges=torch.tensor([[0, 1], [1, 0]]),
        similarities=Similarity(torch.ones(2), eye[:, :3, :3], torch.zeros(2, 3)),
        weights=torch.tensor(weights).view(2, 2, 1, 1),
        residuals=torch.tensor(residuals).view(2, 2, 1, 1),
        mu=mu,
    )


def test_a_label_needs_a_view_that_its_pairs_agree_on_and_a_pair_that_is_at_all_sure() -> None:
    found = _by_hand([0.1, 0.2, 0.4, 1.1], [0.0, 0.0, 0.0, 0.0], mu=1.0)  # means: 0.6 and 0.3
    labels = pseudo_labels(found, cut=0.5)
    assert labels.valid1.flatten().tolist() == [True, False]  # view 0 first, view 1 first
    assert labels.valid2.flatten().tolist() == [False, True]
    unsure = _by_hand([0.0, 0.2, 0.4, 1.2], [0.0, 0.0, 0.0, 0.0], mu=1.0)
    assert pseudo_labels(unsure, cut=0.5).valid1.flatten().tolist() == [False, False]
    with pytest.raises(AdaptError, match=r"no label: the highest weight is 0\.6, cut 50"):
        pseudo_labels(found, cut=50)


def test_the_usual_cut_is_what_a_residual_of_mu_leaves_of_the_mean_initial_weight() -> None:
    found = _by_hand([2.0, 1.0, 0.25, 0.25], [0.0, 0.1, 0.1, 0.3], mu=0.1)  # initial 2, 4, 1, 4
    assert usual_cut(found) == pytest.approx(0.6875)
    assert pseudo_labels(found).valid1.flatten().tolist() == [True, False]  # means 1.125, 0.625


def test_an_oracle_without_flaws_answers_with_the_true_labels() -> None:
    scene, edges = small_scene(3), all_pairs(3)
    pair = Oracle(scene, Flaws(scales=0.5)).predictions(edges).pair
    for distance in distances(pair, true_labels(scene, edges)):
        assert distance.max() < 1e-5


def test_a_label_of_a_depth_that_was_not_measured_does_not_hold() -> None:
    scene, edges = small_scene(2), all_pairs(2)
    scene.depths[0, :3] = torch.nan
    labels = true_labels(scene, edges)
    assert labels.points1.isfinite().all()
    assert not labels.valid1[0, :3].any()
    assert labels.share() == 1 - 3 / 48
