"""The small network: its shapes and frames, what it is told, and that it learns and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Generator, Tensor

from polyadapt.core import LoRA, attach, select
from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d import small
from polyadapt.geometry3d.backbones import SmallPointmaps
from polyadapt.geometry3d.cli import main
from polyadapt.geometry3d.correlation import cell_middles
from polyadapt.geometry3d.matching import match_error, pose_errors
from polyadapt.geometry3d.pretrain_small import Plan, answered, batch, measured, pretrain
from polyadapt.geometry3d.small import SmallNetwork, small_network

PLAN = Plan(steps=3, height=24, width=32)


def network(seed: int = 0) -> SmallNetwork:
    torch.manual_seed(seed)
    return SmallNetwork(focal=32.0, width=24, heads=2, encoder_depth=1, stages=2).eval()


def images(seed: int = 0) -> tuple[Tensor, Tensor]:
    first, second = torch.rand(2, 2, 3, 24, 32, generator=Generator().manual_seed(seed))
    return first, second


def test_it_has_at_most_a_million_and_a_half_parameters_and_six_megabytes() -> None:
    numbers = sum(p.numel() for p in SmallNetwork().parameters())
    assert numbers <= 1_500_000
    assert 4 * numbers <= 6_000_000


@torch.no_grad()
def test_the_first_pointmap_lies_on_its_pixels_rays() -> None:
    pair = network()(*images())
    assert pair.points1.shape == (2, 24, 32, 3)
    across = pair.points1[0, 5, :, 0] / pair.points1[0, 5, :, 2] * 32 + 16
    torch.testing.assert_close(across, torch.arange(32) + 0.5)
    assert pair.points1[..., 2].min() > 0
    assert min(pair.confidence1.min(), pair.confidence2.min()) > 1


@torch.no_grad()
def test_the_second_camera_is_one_baseline_away_and_its_points_on_its_rays() -> None:
    model = network()
    one, two = (model.encode(part) for part in images())
    answer = model.relate(one, two)
    pose = answer.poses[-1]
    torch.testing.assert_close(pose.centre.norm(dim=-1), torch.ones(2))
    local = (answer.pair.points2 - pose.centre[:, None, None]) @ pose.rotation[:, None]
    down = local[1, :, 7, 1] / local[1, :, 7, 2] * 32 + 12
    torch.testing.assert_close(down, torch.arange(24) + 0.5, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_pair_is_answered_alike_alone_and_among_others() -> None:
    model, (first, second) = network(), images()
    together = model(first, second)
    for part, whole in zip(model(first[1:], second[1:]), together, strict=True):
        torch.testing.assert_close(part, whole[1:], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_same_image_twice_matches_itself_and_has_a_finite_answer() -> None:
    model, (first, _) = network(), images()
    model.sharpness.fill_(5.0)
    seen = model.encode(first)
    answer = model.relate(seen, seen)
    middles = cell_middles(12, 16, answer.matches.at)
    inner = ((middles >= 2) & (middles < torch.tensor([14, 10]))).all(-1)
    assert (answer.matches.at[:, :, inner] - middles[inner]).norm(dim=-1).max() < 0.5
    assert answer.matches.cycle.median() < 0.1
    assert all(part.isfinite().all() for part in answer.pair)


def test_every_parameter_and_a_sets_factors_learn_from_the_pointmaps() -> None:
    model = network()
    pair = model(*images())
    (pair.points1.mean() + pair.points2.mean() + pair.confidence1.mean()).backward()
    blind = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert blind <= {"sharpness"} | {n for n in blind if ".move.0." in n or ".norm." in n}
    adapters = attach(model, LoRA(rank=2), SmallPointmaps.default_sites, "scene")
    model.zero_grad()
    pair = model(*images())
    (pair.points1.mean() + pair.points2.mean()).backward()
    assert all(p.grad is not None for p in adapters.parameters())
    assert len(select(model, SmallPointmaps.default_sites)) == 1 + 2


def test_images_that_do_not_fit_are_refused() -> None:
    first, second = images()
    for one, two in ((first, second[..., :28]), (first[..., :30], second[..., :30])):
        with pytest.raises(AdaptError, match="two images of one size, sides divisible by 4"):
            network()(one, two)


def test_settings_and_missing_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "WEIGHTS", tmp_path / "small_pointmaps.safetensors")
    with pytest.raises(AdaptError, match="no weight file small_pointmaps"):
        small_network()
    for focal in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(AdaptError, match="pixels, above 0"):
            small_network(focal, pretrained=False)


def test_a_random_backbone_is_the_same_each_time() -> None:
    one, two = (SmallPointmaps(pretrained=False, seed=5).build() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_training_cut_off_and_continued_is_training(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert pretrain(whole, PLAN, measure_every=0)
    while not pretrain(cut, PLAN, stop_after=0.0, measure_every=0):
        assert cut.with_name("cut.safetensors.state").exists()
    assert not cut.with_name("cut.safetensors.state").exists()
    stored, again = load_file(whole), load_file(cut)
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    SmallNetwork(focal=32.0).load_state_dict(stored)


def test_a_state_of_another_plan_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    assert not pretrain(out, PLAN, stop_after=0.0, measure_every=0)
    with pytest.raises(AdaptError, match="is of another plan"):
        pretrain(out, Plan(steps=4, height=24, width=32))


@pytest.mark.parametrize(
    "words",
    [["--steps", "0"], ["--threads", "0"], ["--height", "26"], ["--width", "8"]],
    ids=["steps", "threads", "height", "width"],
)
def test_plans_that_cannot_be_are_refused_in_one_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "small.safetensors")
    with pytest.raises(AdaptError, match=r"^[^\n]+$"):
        main(["pretrain-small", "--out", out, *words])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdaptError, match="does not exist"):
        pretrain(tmp_path / "none" / "small.safetensors", PLAN)


@pytest.mark.slow
def test_a_short_training_betters_matches_and_pointmaps(tmp_path: Path) -> None:
    plan = Plan(steps=60, height=24, width=32)
    before = measured(SmallNetwork(focal=32.0).eval(), plan, scenes=8)
    pretrain(tmp_path / "small.safetensors", plan, measure_every=0)
    model = SmallNetwork(focal=32.0)
    model.load_state_dict(load_file(tmp_path / "small.safetensors"))
    after = measured(model, plan, scenes=8)
    assert after["median"] < 0.7 * before["median"]
    assert after["other"] < 0.9 * before["other"]
    assert after["other"] < 0.9 * after["other, shuffled"]


@torch.no_grad()
def test_a_batch_pairs_views_of_one_scene() -> None:
    scenes, truth, edges = batch(range(2), PLAN, Generator().manual_seed(0))
    assert scenes.shape == (8, 3, 24, 32)
    assert edges.shape == (6, 2)
    assert (edges // 4 == torch.tensor([0, 0, 0, 1, 1, 1])[:, None]).all()
    assert (edges[:, 0] != edges[:, 1]).all()
    answer = answered(SmallNetwork(focal=32.0).eval(), scenes, edges)
    assert match_error(answer, truth).numel() == int(truth.seen.sum())
    assert [error.shape for error in pose_errors(answer, truth)] == [(4, 6), (4, 6)]


def test_the_packaged_weights_match_their_images_and_use_the_second_one() -> None:
    assert small.WEIGHTS.stat().st_size <= 6_000_000
    network = small_network().eval()
    assert sum(p.numel() for p in network.parameters()) <= 1_500_000
    found = measured(network, Plan(), scenes=4)
    assert found["median"] < 0.12  # tokens of 4 pixels
    assert found["match"] < 0.3
    assert found["own"] < 0.9 * found["own, same image"]
    assert found["own"] < 0.75 * found["own, shuffled"]
