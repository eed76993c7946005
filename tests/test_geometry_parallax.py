"""What a turn of the camera explains tells no depth: such pairs are found, and refused or left."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d.cameras import inverse_poses, moved, pose
from polyadapt.geometry3d.connected import one_scene
from polyadapt.geometry3d.parallax import Parallax, parallax, turned
from polyadapt.geometry3d.pointmaps import Pair
from polyadapt.geometry3d.predictions import Predictions
from polyadapt.geometry3d.reconstruction import Reconstruction
from polyadapt.geometry3d.rotations import rotation_of
from polyadapt.geometry3d.scenes.camouflage import NIGHT, NONE, Shift, camouflaged
from polyadapt.tests.command_cases import Run, command
from polyadapt.tests.scene_files import save_images

pytestmark = pytest.mark.slow

HERE = torch.zeros(3)
SEEDS = (60, 61, 62, 63)  # heightfields and boxes
# Radians about x, y and z.
TURNS = {"aside": (0.0, 0.2, 0.0), "up": (-0.15, 0.05, 0.0), "rolled": (0.02, 0.1, 0.15)}


def camera(turn: tuple[float, float, float], centre: Tensor = HERE) -> Tensor:
    return pose(rotation_of(torch.tensor(turn, dtype=torch.float32)), centre)


def seen_from(seed: int, *cameras: Tensor, shift: Shift = NONE, scale: int = 1) -> Reconstruction:
    size = (48 * scale, 64 * scale)
    return camouflaged(seed, len(cameras), size, shift=shift, poses=torch.stack(cameras))


def between(scene: Reconstruction, off: float = 0.03, i: int = 0, j: int = 1) -> Parallax:
    """Searched for from a turn that is wrong by so many radians."""
    true = (inverse_poses(scene.poses[j]) @ scene.poses[i])[:3, :3]
    begin = rotation_of(torch.tensor([off, -off, off])) @ true
    one, two, f = scene.images[i], scene.images[j], scene.focals
    return parallax(one[None], two[None], begin[None], f[i, None], f[j, None])


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_turn_leaves_no_motion_whatever_the_scene_is(seed: int, turn: str) -> None:
    found = between(seen_from(seed, camera((0, 0, 0)), camera(TURNS[turn])))
    assert found.left.item() < 0.2
    assert found.alike.item() > 0.9


@pytest.mark.parametrize("seed", SEEDS)
def test_a_turn_is_told_by_night_and_in_larger_images(seed: int) -> None:
    cameras = camera((0, 0, 0)), camera((0.0, 0.15, 0.0))
    assert between(seen_from(seed, *cameras, shift=NIGHT)).left.item() < 0.35
    assert between(seen_from(seed, *cameras, scale=8)).left.item() < 0.3  # 512 pixels


@pytest.mark.parametrize("seed", range(60, 72))
def test_cameras_that_stand_apart_leave_motion(seed: int) -> None:
    scene = camouflaged(seed, 3)
    assert all(between(scene, 0.0, i, j).left.item() > 0.4 for i, j in ((0, 1), (1, 2), (0, 2)))


def test_a_camera_that_moves_along_a_wall_is_not_taken_for_one_that_turns() -> None:
    """A heightfield is nearly a wall; moving by a fifth of its distance looks like 11 degrees."""
    aside = torch.tensor([0.2, 0.0, 0.0])
    scene = seen_from(60, camera((0, 0, 0)), camera((0.0, 0.0, 0.0), aside))
    turn = rotation_of(torch.tensor([0.0, -math.atan(0.2), 0.0]))
    f = scene.focals[:1]
    found = parallax(scene.images[:1], scene.images[1:], turn[None], f, f)
    assert found.left.item() > 0.4


def said(scene: Reconstruction) -> Predictions:
    """All pairs, as a network that knows the scene."""
    n = len(scene)
    edges = torch.tensor([[i, j] for i in range(n) for j in range(n) if i != j])
    points, (first, second) = scene.points(), edges.T
    into = inverse_poses(scene.poses)[first]
    sure = torch.full(points[first].shape[:-1], 5.0)
    return Predictions(
        edges, Pair(moved(points[first], into), sure, moved(points[second], into), sure)
    )


def mixed(seed: int = 60) -> Reconstruction:
    """Three cameras that stand apart, and one that turned where the first stands."""
    poses = camouflaged(seed, 3).poses
    more = poses[0] @ camera((0.0, 0.12, 0.0))
    return seen_from(seed, *poses, more)


@pytest.mark.parametrize("known", [True, False])
def test_pairs_from_one_place_are_told_in_both_orders(known: bool) -> None:
    scene = mixed()
    found = said(scene)
    alone = turned(found, scene.images, scene.focals if known else None)
    assert found.edges[alone].tolist() == [[0, 3], [3, 0]]


def test_pairs_from_one_place_are_left_out_of_a_scene() -> None:
    scene = mixed()
    found = one_scene(said(scene), scene.images, scene.names, scene.focals)
    assert len(found.edges) == 10
    assert [0, 3] not in found.edges.tolist()


def test_an_image_without_parallax_against_the_rest_is_named() -> None:
    poses = camouflaged(60, 2).poses
    scene = seen_from(60, *poses, poses[0] @ camera((0.0, 0.12, 0.0)))
    every = said(scene)
    window = every.only((every.edges != torch.tensor([1, 2])).any(1))  # 1 and 2 are not asked about
    window = window.only((window.edges != torch.tensor([2, 1])).any(1))
    with pytest.raises(AdaptError, match=r"^camouflaged-60-2: no parallax against the rest"):
        one_scene(window, scene.images, scene.names, scene.focals)


def test_images_from_one_place_are_refused() -> None:
    scene = seen_from(61, *(camera((0.0, 0.08 * k, 0.0)) for k in range(3)))
    with pytest.raises(AdaptError, match=r"^camouflaged-61-0 and the others show no parallax"):
        one_scene(said(scene), scene.images, scene.names, scene.focals)


def test_nothing_is_told_of_images_that_are_too_small() -> None:
    scene = camouflaged(
        61, 2, (24, 32), poses=torch.stack([camera((0, 0, 0)), camera((0, 0.1, 0))])
    )
    assert turned(said(scene), scene.images, scene.focals).tolist() == [False, False]


@pytest.fixture
def reconstruct(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    words = ("--backbone", "small", "--focal", 64, "--sweeps", 3, "--out", tmp_path / "found")
    run = command(capsys, "geometry3d", "reconstruct")
    return lambda images: run(save_images(images, tmp_path / "images"), *words)


@pytest.mark.parametrize("seed", [40, 41, 44])
def test_the_small_network_is_not_asked_to_make_a_scene_of_turns(
    seed: int, reconstruct: Run, tmp_path: Path
) -> None:
    turns = ((0.0, 0.0, 0.0), (0.03, 0.07, 0.0), (-0.03, -0.06, 0.02))
    line = reconstruct(seen_from(seed, *map(camera, turns)).images).line()
    assert "0.png and the others show no parallax" in line
    assert not (tmp_path / "found").exists()


def test_images_that_differ_by_noise_are_refused(reconstruct: Run) -> None:
    one = seen_from(44, camera((0, 0, 0))).images
    noise = 0.01 * torch.randn(3, *one.shape[1:], generator=torch.Generator().manual_seed(0))
    code, _, err = reconstruct((one + noise).clamp(0, 1))
    assert code == 2
    assert "show no parallax" in err


def test_a_scene_with_two_images_from_one_place_is_reconstructed_without_their_pair(
    reconstruct: Run,
) -> None:
    code, out, _ = reconstruct(mixed(44).images)
    assert code == 0
    assert out.splitlines()[0] == "left out: 2 of 12 pairs, taken from one place"
    assert out.splitlines()[1].startswith("4 views, ")
