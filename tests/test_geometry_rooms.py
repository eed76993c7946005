"""Generated rooms: one world for all views and conditions, each condition as it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d.overlap import overlap
from polyadapt.geometry3d.scenes.light import Light
from polyadapt.geometry3d.scenes.rooms import CONDITIONS, Conditions, room
from polyadapt.tests.scene_cases import differences


@pytest.mark.parametrize("conditions", CONDITIONS)
def test_every_pixel_of_a_room_has_a_depth_and_no_camera_stands_in_a_thing(conditions: str) -> None:
    for seed in range(5):
        depths = room(seed, conditions, views=6, size=(24, 32), samples=1).depths
        assert depths.isfinite().all()
        assert depths.min() > 0.15
        assert depths.max() < 15


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_see_the_same_colours_at_the_same_points(seed: int) -> None:
    same, elsewhere = differences(room(seed, views=10, size=(96, 128)).of_views([4, 5]))
    assert same.shape[1] > 1000
    assert same.mean() < 0.4 * elsewhere.mean()


def test_all_conditions_show_the_same_room() -> None:
    day, night = room(3, views=4), room(3, "night", views=4)
    assert torch.equal(day.depths, night.depths)
    assert torch.equal(day.poses, night.poses)
    assert night.images.mean() < 0.5 * day.images.mean()
    assert not torch.equal(day.depths, room(4, views=4).depths)


def test_the_night_camera_is_noisy_but_always_the_same() -> None:
    lit = CONDITIONS["night"].light
    quiet = Conditions(light=Light(lit.ambient, lit.lamp, lit.reach, lit.tint))
    noisy, clean = room(1, "night", views=2).images, room(1, quiet, views=2).images
    bright = clean > 0.15  # where black does not cut the noise off
    assert (noisy - clean)[bright].std() == pytest.approx(0.03, rel=0.2)
    assert torch.equal(noisy, room(1, "night", views=2).images)


def test_the_moving_box_is_not_to_be_trusted_and_nothing_else_moved() -> None:
    still, moving = room(2, views=5), room(2, "moving", views=5)
    assert torch.equal(still.weights, torch.ones_like(still.weights))
    trusted = moving.weights > 0
    assert (~trusted).flatten(1).any(1).sum() >= 4  # it is seen by most views
    # Elsewhere only the pixels differ where it stands when still.
    assert (still.depths == moving.depths)[trusted].float().mean() > 0.9
    assert (moving.depths < still.depths)[~trusted].float().mean() > 0.5


def test_the_overlap_is_narrow_or_wide_as_the_conditions_say() -> None:
    neighbours = {
        name: torch.stack([overlap(room(s, name, samples=1)).diagonal(1) for s in range(3)]).mean()
        for name in ("narrow", "day", "walk")
    }
    assert 0.1 < neighbours["narrow"] < 0.45
    assert neighbours["narrow"] + 0.15 < neighbours["day"]
    assert neighbours["day"] < neighbours["walk"]


def test_more_samples_smooth_the_colours_and_leave_the_depths() -> None:
    rough, smooth = room(0, views=2, samples=1), room(0, views=2, samples=3)
    assert torch.equal(rough.depths, smooth.depths)
    steps = [(s.images[..., 1:] - s.images[..., :-1]).abs().mean() for s in (rough, smooth)]
    assert steps[1] < steps[0]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"conditions": "dusk"}, "unknown conditions 'dusk': there are day, night"),
        ({"views": 0}, "0 views of 2 samples"),
        ({"samples": 0}, "10 views of 0 samples"),
    ],
    ids=["conditions", "views", "samples"],
)
def test_a_room_that_cannot_be_made_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(AdaptError, match=said):
        room(0, **asked)
