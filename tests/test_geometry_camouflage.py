"""Camouflaged scenes: exact geometry, the same colour from every side, the promised overlap."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch

from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d.overlap import overlap
from polyadapt.geometry3d.reconstruction import Reconstruction
from polyadapt.geometry3d.scenes.bodies import Bodies, cast, normals
from polyadapt.geometry3d.scenes.camouflage import NIGHT, ORBIT, camouflaged
from polyadapt.geometry3d.scenes.draw import Draw
from polyadapt.geometry3d.scenes.heights import Heights, meet
from polyadapt.geometry3d.scenes.textures import colour_at, noise
from polyadapt.geometry3d.scenes.viewing import Rays, looking, rays_of
from polyadapt.tests.scene_cases import differences

_IN_ANOTHER_PROCESS = (
    "from polyadapt.tests.test_geometry_camouflage import bits; print(bits(4), bits(5))"
)


def bits(seed: int) -> str:
    """A digest of everything that a scene consists of."""
    scene = camouflaged(seed)
    parts = (scene.images, scene.depths, scene.poses, scene.focals)
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def _bodies(*, round: int = 0, half: tuple[float, float, float] = (0.5, 0.5, 0.5)) -> Bodies:
    centre = torch.tensor([0.0, 0, 2]).expand(1, 1, 3)
    return Bodies(centre, torch.eye(3)[None], torch.tensor([half]), round)


def _rays(*directions: tuple[float, float]) -> Rays:
    ahead = [(u, v, 1.0) for u, v in directions]
    return Rays(torch.zeros(1, 3), torch.tensor([ahead]))


def test_a_box_is_met_at_its_front_and_beside_it_there_is_nothing() -> None:
    hits = cast(_rays((0, 0), (0.33, 0.1), (0.34, 0)), _bodies())
    assert hits.depth[0].tolist() == [1.5, 1.5, math.inf]  # the front's edge is seen at 1/3
    assert hits.face[0, :2].tolist() == [4, 4]  # z stands out, towards the camera
    torch.testing.assert_close(hits.place[:, 0, 1], torch.tensor([0.33 * 1.5, 0.15]))


def test_a_ball_is_met_at_its_nearer_side() -> None:
    bodies = _bodies(round=1, half=(1, 1, 1))
    rays = _rays((0, 0), (0.5, 0), (0.6, 0))
    hits = cast(rays, bodies)
    # |(t/2, 0, t - 2)| = 1 at 1.25 t^2 - 4 t + 3 = 0; a tangent from 2 away is 1/sqrt(3) aside.
    torch.testing.assert_close(hits.depth[0], torch.tensor([1.0, 1.2, math.inf]))
    normal = normals(rays, bodies, hits)[0, 1]
    torch.testing.assert_close(normal, torch.tensor([0.6, 0.0, -0.8]))


def test_a_camera_inside_a_box_sees_its_walls_which_look_back() -> None:
    bodies, rays = _bodies(half=(3, 3, 4)), _rays((0, 0), (2, 0))
    hits = cast(rays, bodies)
    assert hits.depth[0].tolist() == [6, 1.5]
    assert normals(rays, bodies, hits)[0].tolist() == [[0, 0, -1], [-1, 0, 0]]


def test_a_slope_is_met_where_its_equation_says() -> None:
    across = torch.linspace(-2, 2, 65)
    slope = Heights(1 + 0.2 * across.expand(65, 65), 2.0, torch.eye(3))  # z = 1 + x / 5
    depth, x, y = meet(_rays((0, 0), (0.5, 0.25), (-0.5, 0)), slope)
    torch.testing.assert_close(depth[0], torch.tensor([1, 1 / 0.9, 1 / 1.1]))
    torch.testing.assert_close(x[0], depth[0] * torch.tensor([0, 0.5, -0.5]))
    torch.testing.assert_close(y[0], depth[0] * torch.tensor([0, 0.25, 0]))


def test_a_rough_surface_is_met_within_rounding() -> None:
    draw = Draw("rough")
    heights = Heights(1 + 0.15 * noise(draw, 1, 5, 2, 0.5)[0], 2.0, draw.turns(15))
    poses = looking(draw.uniform(-0.2, 0.2, 2, 3), torch.tensor([0.0, 0, 1]).expand(2, 3), draw)
    rays = rays_of(poses, 32.0, (24, 32))
    depth, x, y = meet(rays, heights)
    points = (rays.origins[:, None] + depth[..., None] * rays.directions) @ heights.axes
    place = torch.stack([x, y], -1).view(-1, 2)
    assert (points[..., 2].view(-1) - heights.at(place)).abs().max() < 1e-5


def test_noise_tiles_without_a_seam_and_has_the_promised_spread() -> None:
    tile = noise(Draw("seam"), 8, 4, 5, 0.8)
    assert tile.shape == (8, 128, 128)
    assert abs(tile.mean()) < 0.2
    assert 0.8 < tile.std() < 1.2
    seam = (tile[:, :, 0] - tile[:, :, -1]).abs().mean()
    inside = (tile[:, :, 1:] - tile[:, :, :-1]).abs().mean()
    assert seam < 2 * inside


def test_a_tile_repeats_and_is_found_by_its_number() -> None:
    tiles = torch.stack([torch.zeros(1, 8, 8), torch.arange(64.0).view(1, 8, 8)])
    which = torch.tensor([0, 1, 1, 1])
    across, down = torch.tensor([0.5, 0.25, 1.25, 0.25]), torch.tensor([0.5, 0.5, -0.5, 1.5])
    torch.testing.assert_close(
        colour_at(tiles, which, across, down), torch.tensor([[0.0, 34, 34, 34]])
    )


@pytest.mark.parametrize("seed", range(8))
def test_views_of_a_camouflaged_scene_overlap_and_stand_apart(seed: int) -> None:
    scene = camouflaged(seed)
    shares = overlap(scene)
    assert shares.min() > 0.15  # the promise is kept to within a coarse look
    assert shares.max() <= 1
    distances = torch.cdist(scene.poses[:, :3, 3], scene.poses[:, :3, 3])
    assert distances[~torch.eye(4, dtype=torch.bool)].min() >= 0.05
    assert (scene.depths > 0.2).all()
    assert scene.images.min() >= 0
    assert scene.images.max() <= 1
    assert torch.equal(scene.images * 255, (scene.images * 255).round())


@pytest.mark.parametrize("seed", range(4))
def test_two_views_see_the_same_colour_at_the_same_point(seed: int) -> None:
    same, elsewhere = differences(camouflaged(seed))
    assert same.shape[1] > 300
    assert same.mean() < 0.5 * elsewhere.mean()


def test_a_seed_gives_the_same_bits_in_another_process_and_another_seed_others() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _IN_ANOTHER_PROCESS],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == [bits(4), bits(5)]
    assert bits(4) != bits(6)


def test_at_night_the_same_scene_is_dark_and_noisy() -> None:
    day, night = camouflaged(3), camouflaged(3, shift=NIGHT)
    assert torch.equal(day.depths, night.depths)
    assert torch.equal(day.poses, night.poses)
    assert (night.images - 0.25 * day.images).std() == pytest.approx(0.02, rel=0.15)
    assert torch.equal(night.images, camouflaged(3, shift=NIGHT).images)


@pytest.mark.parametrize("seed", [4, 5])
def test_in_an_orbit_cameras_stand_around_the_scene_and_look_at_its_middle(seed: int) -> None:
    scene = camouflaged(seed, views=10, shift=ORBIT)
    towards = torch.tensor([0.0, 0, 1]) - scene.poses[:, :3, 3]
    distance = towards.norm(dim=-1)
    assert distance.min() > 0.85
    assert distance.max() < 1.2
    assert (((towards / distance[:, None]) * scene.poses[:, :3, 2]).sum(-1) > 0.99).all()
    assert scene.poses[0, :3, 2] @ scene.poses[-1, :3, 2] < math.cos(math.radians(30))
    assert scene.depths.isfinite().all()
    assert overlap(scene).min() > 0.15


def test_size_views_and_focal_are_as_asked() -> None:
    scene = camouflaged(1, views=2, size=(30, 40), focal=50.0)
    assert scene.images.shape == (2, 3, 30, 40)
    assert scene.focals.tolist() == [50, 50]


def test_views_that_cannot_be_are_refused_not_sought_forever() -> None:
    with pytest.raises(AdaptError, match="200 cameras do not fit before one surface"):
        camouflaged(0, views=200)
    with pytest.raises(AdaptError, match="0 views of 64x48 pixels with a focal of 64"):
        camouflaged(0, views=0)
    with pytest.raises(AdaptError, match="with a focal of 20: at least"):
        camouflaged(0, focal=20)
    assert camouflaged(0, views=1, size=(40, 30)).depths.isfinite().all()  # tall


def test_what_another_thing_hides_does_not_overlap() -> None:
    # Two cameras, 1 apart, look at a wall 2 away; the second has something close before its left.
    poses = torch.eye(4).repeat(2, 1, 1)
    poses[1, 0, 3] = 1
    depths = torch.full((2, 8, 16), 2.0)
    flat = Reconstruction(
        poses, torch.full((2,), 16.0), depths, depths, torch.zeros(2, 3, 8, 16), ["a", "b"]
    )
    # 1 aside at depth 2 and focal 16: 8 of 16 columns.
    torch.testing.assert_close(overlap(flat), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    flat.depths[1, :, :4] = 1
    assert overlap(flat)[0, 1] == 0.25
