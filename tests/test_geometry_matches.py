"""Correlation, crossing rays, fitted poses and true matches: the parts of the small network."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from polyadapt.geometry3d.cameras import rays
from polyadapt.geometry3d.correlation import Matches, cell_middles, correlation, matched
from polyadapt.geometry3d.matching import (
    Truth,
    correlation_loss,
    joined,
    refinement_loss,
    truth_of,
)
from polyadapt.geometry3d.rotations import angle_of, rotation_of
from polyadapt.geometry3d.scenes.camouflage import camouflaged
from polyadapt.geometry3d.two_rays import crossing
from polyadapt.geometry3d.two_view_pose import Pose, _solved, two_view_pose

ROWS, COLUMNS = 8, 10
SIZE = (24, 32)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


def shifted_matches(sharpness: float = 4.0) -> Matches:
    """The second image shows the first one's cells two columns further left."""
    wide = noise(1, 16, ROWS, COLUMNS + 2)
    first, second = wide[..., :COLUMNS], wide[..., 2:]
    return matched(correlation(first, second, torch.tensor(sharpness)), ROWS, COLUMNS)


def test_a_shift_is_found_where_both_images_show_the_place() -> None:
    found = shifted_matches()
    middles = cell_middles(ROWS, COLUMNS, found.at)
    both = middles[:, 0] >= 2  # of the first image; the first two columns are out of the second
    wanted = middles - torch.tensor([2.0, 0.0])
    torch.testing.assert_close(found.at[0, 0, both], wanted[both], rtol=0, atol=0.02)
    assert found.mass[0, 0, both].min() > 0.9
    assert found.cycle[0, 0, both].max() < 0.05


def test_a_place_that_the_other_image_does_not_show_has_a_cycle_error_or_little_mass() -> None:
    found = shifted_matches()
    out = cell_middles(ROWS, COLUMNS, found.at)[:, 0] < 2
    unsure = (found.cycle[0, 0, out] > 0.5) | (found.mass[0, 0, out] < 0.9)
    assert unsure.float().mean() > 0.8


def test_a_match_lies_between_cells_where_their_correlation_is_equal() -> None:
    logits = torch.full((1, 42, 42), -20.0)
    logits[0, 0, 16] = logits[0, 0, 17] = 5.0  # row 2, columns 2 and 3 of 6 x 7
    found = matched(logits, 6, 7)
    torch.testing.assert_close(found.at[0, 0, 0], torch.tensor([2.5, 2.0]))


def test_refining_has_a_gradient_and_mass_has_none() -> None:
    logits = noise(1, 42, 42).requires_grad_()
    found = matched(logits, 6, 7)
    assert not found.mass.requires_grad
    assert not found.cycle.requires_grad
    found.at.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


def test_crossing_rays_give_depth_in_baselines_and_where_they_miss() -> None:
    ahead = torch.tensor([[[0.1, 0.2, 1.0]]])
    centre, turn = torch.tensor([[0.6, 0.8, 0.0]]), rotation_of(torch.tensor([[0.1, -0.2, 0.3]]))
    point = 5 * ahead - centre[:, None]
    other = (point @ turn) / (point @ turn)[..., 2:]  # R^T (X - t)
    found = crossing(ahead, other, turn, centre)
    assert found.depth.item() == pytest.approx(math.log(5), abs=1e-3)
    assert found.miss.item() == pytest.approx(0, abs=1e-6)
    astray = crossing(ahead, other + torch.tensor([0.0, 0.05, 0.0]), turn, centre)
    back = crossing(ahead, other - torch.tensor([0.0, 0.05, 0.0]), turn, centre)
    assert astray.miss.item() * back.miss.item() < -1e-4
    behind = crossing(ahead, other, turn, -centre)
    assert found.parallax.item() < math.pi / 2 < behind.parallax.item()


def test_rays_that_are_parallel_have_a_finite_depth_and_gradient() -> None:
    ahead = torch.tensor([[[0.0, 0.0, 1.0]]], requires_grad=True)
    found = crossing(ahead, ahead.detach(), torch.eye(3)[None], torch.tensor([[1.0, 0, 0]]))
    torch.stack(list(found)).sum().backward()
    assert ahead.grad is not None
    assert ahead.grad.isfinite().all()
    assert torch.stack(list(found)).isfinite().all()


def seen_from(pose: Pose, outliers: float = 0.0, blur: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rays of a hilly ground from two cameras; some matches are anywhere."""
    own = rays(torch.tensor([32.0]), 24, 32).reshape(1, -1, 3)
    x, y = own[..., 0], own[..., 1]
    depth = 4 + 1.2 * (5 * x).sin() * (4 * y).cos() + x
    point = own * depth[..., None] - pose.centre[:, None]
    other = point @ pose.rotation
    flat = other[..., :2] / other[..., 2:] + blur * noise(*x.shape, 2)
    wild = torch.rand(x.shape, generator=Generator().manual_seed(1)) < outliers
    flat = torch.where(wild[..., None], 0.4 * noise(*x.shape, 2, seed=2), flat)
    return own, F.pad(flat, (0, 1), value=1.0)


@pytest.mark.parametrize(
    ("outliers", "blur", "degrees"), [(0, 0, 1.5), (0.2, 0, 3), (0, 0.01, 4)],
    ids=["exact", "outliers", "blurred"],
)  # fmt: skip
def test_a_pose_is_fitted_to_matches(outliers: float, blur: float, degrees: float) -> None:
    centre = torch.tensor([[0.8, -0.1, 0.59]])
    pose = Pose(rotation_of(torch.tensor([[0.05, -0.15, 0.1]])), F.normalize(centre, dim=-1))
    own, other = seen_from(pose, outliers, blur)
    found = two_view_pose(own, other, torch.ones(own.shape[:2]))
    assert angle_of(found.rotation.mT @ pose.rotation).rad2deg() < degrees
    assert (found.centre * pose.centre).sum().clamp(max=1).acos().rad2deg() < 2 * degrees


def test_weights_of_zero_take_matches_out() -> None:
    pose = Pose(rotation_of(torch.tensor([[0.0, -0.1, 0.0]])), torch.tensor([[1.0, 0, 0]]))
    own, other = seen_from(pose)
    wrong = other.clone()
    wrong[:, ::2] = 0.3
    weights = torch.ones(own.shape[:2])
    weights[:, ::2] = 0
    apart = two_view_pose(own[:, 1::2], other[:, 1::2], weights[:, 1::2])
    found = two_view_pose(own, wrong, weights)
    torch.testing.assert_close(found.rotation, apart.rotation, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.centre, apart.centre, rtol=0, atol=1e-3)


def test_matches_that_say_nothing_give_a_finite_pose() -> None:
    own = rays(torch.tensor([32.0]), 8, 8).reshape(1, -1, 3)
    for other, weight in ((own, 1.0), (own, 0.0), (torch.zeros_like(own), 1.0)):
        found = two_view_pose(own, other, torch.full(own.shape[:2], weight))
        assert found.rotation.isfinite().all()
        assert found.centre.isfinite().all()


@pytest.fixture(scope="module")
def truth() -> Truth:
    edges = torch.tensor([[0, 1], [1, 0], [2, 3]])
    return joined([truth_of(camouflaged(seed, 4, SIZE), edges) for seed in (2, 3)])


def test_true_pointmaps_are_in_the_first_frame_and_in_baselines(truth: Truth) -> None:
    torch.testing.assert_close(truth.centre.norm(dim=-1), torch.ones(6))
    turned = (truth.points1[1] @ truth.rotation[0].mT) + truth.centre[0]
    torch.testing.assert_close(turned, truth.points2[0], rtol=1e-3, atol=1e-3)
    assert truth.labels().share() == 1


def test_a_true_match_shows_the_same_point(truth: Truth) -> None:
    rows, columns = SIZE[0] // 2, SIZE[1] // 2
    to_grid = 2 * (truth.at + 0.5) / torch.tensor([columns, rows]) - 1
    for points, other, way in (
        (truth.points1, truth.points2, 0),
        (truth.points2, truth.points1, 1),
    ):
        there = F.grid_sample(other.movedim(-1, 1), to_grid[:, way, None], align_corners=False)
        own = F.avg_pool2d(points.movedim(-1, 1), 2).flatten(2)
        off = (there[:, :, 0] - own).norm(dim=1)[truth.seen[:, way]] / own.norm(dim=1).mean()
        assert off.quantile(0.9) < 0.03
    assert 0.2 < truth.seen.float().mean() < 0.99


def test_the_correlation_loss_is_least_at_the_true_match() -> None:
    at, seen = torch.tensor([[[1.25, 0.0]]]), torch.tensor([[True]])
    sharp = torch.tensor([[[-30.0, math.log(0.75), math.log(0.25), -30.0]]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert correlation_loss(sharp, at, seen, 4).item() == pytest.approx(entropy, abs=1e-4)
    assert correlation_loss(sharp.flip(-1), at, seen, 4).item() > entropy + 0.1
    assert correlation_loss(sharp, at, ~seen, 4).item() == 0


def test_the_refinement_loss_leaves_out_what_is_unseen_or_far_off(truth: Truth) -> None:
    at = truth.at + 0.5 / 2**0.5  # 0.5 cells off
    sure = torch.ones_like(truth.seen, dtype=torch.float32)
    expected = 0.5 - 0.05  # smooth L1 with beta 0.1
    found = refinement_loss(Matches(at, sure, sure), truth)
    assert found.item() == pytest.approx(expected, rel=1e-3)
    wild = torch.where(truth.seen[..., None], at, at + 100)
    assert refinement_loss(Matches(wild, sure, sure), truth).item() == pytest.approx(
        expected, rel=1e-3
    )
    assert refinement_loss(Matches(at + 10, sure, sure), truth).item() == 0


def test_a_square_that_rounding_made_negative_gives_no_trust_without_bound() -> None:
    chance = torch.Generator().manual_seed(0)
    slopes = torch.randn(1, 30, 2, 8, generator=chance)
    spread = torch.eye(2).expand(1, 30, 2, 2).clone()
    spread[:, 0] = torch.tensor([[0.0, 0.0], [0.0, -(2.0**-10)]])  # meant as 0
    off = torch.ones(1, 30, 2)
    off[:, 0] = torch.tensor([1.0, 64.0])  # a square of -4, and a trust of 1 / 0
    assert bool(_solved(slopes, off, spread, torch.ones(1, 30)).isfinite().all())
