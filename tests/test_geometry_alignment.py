"""Alignment of all pairs: exact stays exact, noise averages out, outliers lose their weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyadapt.core import AdaptError
from polyadapt.geometry3d.alignment import Alignment, align
from polyadapt.geometry3d.graph import Window
from polyadapt.geometry3d.oracle import Flaws, Oracle
from polyadapt.geometry3d.pointmaps import Pair
from polyadapt.geometry3d.predictions import Predictions, predict
from polyadapt.geometry3d.reconstruction import Reconstruction
from polyadapt.geometry3d.similarity import fit_similarity
from polyadapt.geometry3d.view_scores import point_error, true_pairs
from polyadapt.geometry3d.weights import Calibrated, Fixed
from polyadapt.tests.geometry_cases import FOCAL, all_pairs, auc, small_scene

pytestmark = pytest.mark.slow


def _ate(found: Alignment, scene: Reconstruction) -> float:
    """Of the camera centres, as a share of the scene's radius, after a similarity."""
    centres = scene.poses[:, :3, 3]
    there = fit_similarity(found.poses[:, :3, 3], centres).apply(found.poses[:, :3, 3])
    return float((there - centres).square().sum(-1).mean().sqrt() / _radius(scene))


def _radius(scene: Reconstruction) -> Tensor:
    points = scene.points().flatten(0, 2)
    radius: Tensor = (points - points.mean(0)).norm(dim=-1).mean()
    return radius


def _errors(said: Pair, scene: Reconstruction, edges: Tensor) -> tuple[float, float]:
    """Mean relative error of the pairs' own views and of their other views."""
    error = point_error(said, true_pairs(scene, edges))
    return float((error.own / error.size).mean()), float((error.other / error.size).mean())


def _as_pairs(found: Alignment, scene: Reconstruction) -> Pair:
    """What the aligned scene says of every pair."""
    return true_pairs(found.reconstruction(scene.images, scene.names), found.edges)


def _wrong_pixels(said: Predictions, scene: Reconstruction) -> Tensor:
    """Where a prediction, in its median unit, is off by over a quarter of the way, [m, 2, h, w]."""
    truth = true_pairs(scene, said.edges)
    p = torch.stack([said.pair.points1, said.pair.points2], 1)
    q = torch.stack([truth.points1, truth.points2], 1)
    unit = (q.norm(dim=-1) / p.norm(dim=-1)).flatten(1).median(1).values
    off: Tensor = (unit[:, None, None, None, None] * p - q).norm(dim=-1) > 0.25 * q.norm(dim=-1)
    return off


@pytest.mark.parametrize(
    "rule", [Calibrated(), Calibrated("raw"), Fixed()], ids=["log", "raw", "fixed"]
)
@pytest.mark.parametrize("steps", [0, 30])
def test_exact_pointmaps_in_units_of_their_own_give_back_the_scene(
    rule: Calibrated | Fixed, steps: int
) -> None:
    scene = small_scene(6)
    said = Oracle(scene, Flaws(scales=0.5)).predictions(all_pairs(6))
    found = align(said, rule, steps=steps)
    assert _ate(found, scene) < 1e-4  # the gate is 1e-3
    assert (found.focals / FOCAL - 1).abs().max() < 1e-4
    assert max(_errors(_as_pairs(found, scene), scene, found.edges)) < 1e-4
    mean = found.similarities.scale.log().mean().exp().item()
    assert mean == pytest.approx(0.5, rel=0.01)  # each counts as much as its weights, nearly alike
    assert (found.poses[0] - torch.eye(4)).abs().max() < 1e-6


# With weights that fall at the median residual some of the averaging is given away.
@pytest.mark.parametrize(
    ("rule", "noise", "mean"),
    [(Fixed(), 0.12, 0.1), (Calibrated(), 0.1, 0.084)],
    ids=["fixed", "calibrated"],
)
def test_smooth_noise_that_differs_between_pairs_averages_out(
    rule: Calibrated | Fixed, noise: float, mean: float
) -> None:
    scene = small_scene(6)
    said = Oracle(scene, Flaws(noise=noise)).predictions(all_pairs(6))
    assert _errors(said.pair, scene, said.edges) == pytest.approx((mean, mean), rel=0.05)
    own, other = _errors(_as_pairs(align(said, rule, steps=40), scene), scene, said.edges)
    assert own < 0.03
    assert other < 0.06


def test_confident_outliers_lose_their_weight_and_mislead_fixed_weights_alone() -> None:
    scene = small_scene(6)
    flaws = Flaws(outliers=0.2, outlier_views=(2,), confidence=3.0, outlier_confidence=100.0)
    said = Oracle(scene, flaws).predictions(all_pairs(6))
    robust, fixed = align(said, steps=60), align(said, Fixed(), steps=40)
    assert _ate(robust, scene) < 1e-4
    assert _ate(fixed, scene) > 5 * _ate(robust, scene)
    wrong = _wrong_pixels(said, scene)
    assert wrong.float().mean().item() == pytest.approx(0.2 / 6, rel=0.1)
    assert auc(-robust.weights, wrong) > 0.95


def test_the_calibrated_weight_finds_outliers_that_the_raw_confidence_does_not() -> None:
    scene = small_scene(6)
    flaws = Flaws(noise=0.02, outliers=0.2, outlier_confidence=5.0, miscalibration=0.7)
    said = Oracle(scene, flaws).predictions(all_pairs(6))
    found = align(said, steps=40)
    wrong = _wrong_pixels(said, scene)
    confidence = torch.stack([said.pair.confidence1, said.pair.confidence2], 1)
    assert auc(-found.weights, wrong) > 0.95
    assert auc(-found.weights, wrong) > auc(-confidence, wrong) + 0.1


def test_the_same_predictions_give_the_same_bits_twice() -> None:
    said = Oracle(small_scene(4), Flaws(noise=0.1)).predictions(all_pairs(4))
    one, other = align(said, steps=12), align(said, steps=12)
    assert torch.equal(one.depths, other.depths)
    assert torch.equal(one.weights, other.weights)


def test_known_focals_stay_and_mu_is_kept_where_it_is_given() -> None:
    said = Oracle(small_scene(4), Flaws(noise=0.1)).predictions(all_pairs(4))
    known = torch.full((4,), FOCAL)
    found = align(said, Calibrated(mu=0.02), steps=12, focals=known)
    assert torch.equal(found.focals, known)
    assert found.mu == 0.02


def test_an_alignment_reports_every_sweep() -> None:
    said = Oracle(small_scene(3)).predictions(all_pairs(3))
    seen: list[tuple[int, int]] = []
    align(said, steps=3, progress=lambda done, of, _: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_film_is_aligned_from_neighbouring_frames_alone() -> None:
    scene = small_scene(8)
    edges = Window(2).edges(scene.images)
    found = align(Oracle(scene).predictions(edges), steps=10)
    assert _ate(found, scene) < 1e-4


def test_a_camera_that_only_turns_is_found_to_stay_where_it_is() -> None:
    scene = small_scene(4, arc=0.0)
    found = align(Oracle(scene, Flaws(noise=0.02)).predictions(all_pairs(4)), steps=20)
    centres = found.poses[:, :3, 3]
    assert (centres - centres.mean(0)).norm(dim=-1).max() < 0.05 * found.depths.median()


def test_identical_images_get_identical_cameras() -> None:
    scene = small_scene(2).of_views([0, 0, 0])
    found = align(predict(Oracle(scene), scene.images, all_pairs(3)), steps=10)
    assert (found.poses - torch.eye(4)).abs().max() < 1e-3


def test_two_views_are_enough() -> None:
    scene = small_scene(2)
    found = align(Oracle(scene).predictions(all_pairs(2)), steps=10)
    assert max(_errors(_as_pairs(found, scene), scene, found.edges)) < 1e-4


def test_a_map_with_a_handful_of_sure_points_does_not_stop_the_others() -> None:
    scene = small_scene(4)
    said = Oracle(scene).predictions(all_pairs(4))
    said.pair.confidence2[2] = 1.0
    said.pair.confidence2[2, 0, :5] = 9.0
    assert _ate(align(said, steps=10), scene) < 1e-4


def test_points_that_are_not_finite_do_not_count() -> None:
    scene = small_scene(4)
    said = Oracle(scene).predictions(all_pairs(4))
    said.pair.points1[0, :12] = torch.nan
    said.pair.points2[3] = torch.inf
    found = align(said, steps=10)
    assert _ate(found, scene) < 1e-4
    assert found.weights[3, 1].max() == 0


def test_predictions_that_are_all_nan_are_one_line() -> None:
    said = Oracle(small_scene(3)).predictions(all_pairs(3))
    with pytest.raises(AdaptError, match="view 0 overlaps no other"):
        align(Predictions(said.edges, Pair(*(part * torch.nan for part in said.pair))))


def test_a_network_that_puts_everything_at_one_point_is_one_line_that_names_a_view() -> None:
    said = Oracle(small_scene(3)).predictions(all_pairs(3))
    point = torch.ones_like(said.pair.points1)
    same = Predictions(said.edges, said.pair._replace(points1=point, points2=point))
    with pytest.raises(AdaptError, match="view 0: no focal length: none above 0 fits"):
        align(same)
    with pytest.raises(AdaptError, match=r"views 0 and \d: the source points lie on one line"):
        align(same, focals=torch.full((3,), FOCAL))


def test_predictions_without_any_sense_end_in_finite_numbers() -> None:
    said = Oracle(small_scene(3)).predictions(all_pairs(3))
    chance = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, *said.pair.points1.shape, generator=chance)
    wild = Predictions(said.edges, said.pair._replace(points1=one, points2=other))
    found = align(wild, steps=15, focals=torch.full((3,), FOCAL))
    for part in (found.poses, found.depths, found.weights, found.similarities.scale):
        assert part.isfinite().all()


def test_views_that_nothing_sure_joins_are_named() -> None:
    said = Oracle(small_scene(4)).predictions(all_pairs(4))
    across = (said.edges[:, 0] < 2) != (said.edges[:, 1] < 2)
    for confidence in (said.pair.confidence1, said.pair.confidence2):
        confidence[across] = 1.2
    with pytest.raises(AdaptError, match=r"views \[2, 3\] overlap none of the others"):
        align(said)


def test_pairs_in_one_order_alone_are_refused() -> None:
    said = Oracle(small_scene(3)).predictions(torch.tensor([[0, 1], [0, 2]]))
    with pytest.raises(AdaptError, match="no pair begins with view 1"):
        align(said)


def test_an_oracle_answers_for_images_as_for_numbers_and_knows_its_own_alone() -> None:
    scene = small_scene(3)
    oracle = Oracle(scene, Flaws(noise=0.1, common=0.05, outliers=0.1, miscalibration=0.5))
    asked = predict(oracle, scene.images, all_pairs(3), batch=4)
    told = oracle.predictions(all_pairs(3))
    assert all(torch.equal(a, b) for a, b in zip(asked.pair, told.pair, strict=True))
    with pytest.raises(AdaptError, match="not of its scene"):
        oracle(scene.images[:1] + 1, scene.images[:1])


def test_noise_has_the_size_it_was_asked_for_and_common_noise_no_spread() -> None:
    scene = small_scene(3)
    noisy = Oracle(scene, Flaws(noise=0.1, scales=0)).predictions(all_pairs(3))
    off = (noisy.pair.points1 - true_pairs(scene, noisy.edges).points1).norm(dim=-1)
    relative = off / scene.depths[noisy.edges[:, 0]]
    assert relative.square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-4)
    biased = Oracle(scene, Flaws(common=0.1, scales=0)).predictions(all_pairs(3))
    assert torch.equal(biased.pair.points1[0], biased.pair.points1[1])


def test_memory_that_does_not_suffice_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*images: Tensor) -> Pair:
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB")

    scene = small_scene(3)
    oracle = Oracle(scene)
    said = oracle.predictions(all_pairs(3))
    monkeypatch.setattr(oracle, "forward", exhausted)
    with pytest.raises(AdaptError, match="out of memory asking about 2 pairs of 32x24 pixels"):
        predict(oracle, scene.images, all_pairs(3))
    monkeypatch.setattr(torch.linalg, "svd", exhausted)
    with pytest.raises(AdaptError, match="out of memory aligning 6 pairs of 32x24 pixels"):
        align(said)


def test_what_does_not_belong_together_is_said_in_one_line() -> None:
    said = Oracle(small_scene(3)).predictions(all_pairs(3))
    with pytest.raises(AdaptError, match=r"views of \(24, 32\) and \(12, 32\) pixels: .* one size"):
        Predictions(said.edges, said.pair._replace(points2=said.pair.points2[:, :12]))
    with pytest.raises(AdaptError, match="6 predictions for 5 pairs"):
        Predictions(said.edges[:5], said.pair)
    with pytest.raises(AdaptError, match=r"\[2\] focals for 3 views"):
        align(said, focals=torch.ones(2))
    with pytest.raises(AdaptError, match="refreshed every 0"):
        align(said, refresh=0)
