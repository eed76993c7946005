"""Generated vessel trees: exact masks, one tree at every size, the same bits for a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from polyadapt.core.errors import AdaptError
from polyadapt.vision.medical.vessels import Vessels, draw_mask, grow, vessel_picture


def test_a_seed_has_one_picture_and_another_seed_another() -> None:
    picture, mask = vessel_picture(5, 40, 56)
    np.random.default_rng().standard_normal(7)  # whoever else draws changes nothing
    again, same = vessel_picture(5, 40, 56)
    assert picture.tobytes() == again.tobytes()
    assert mask.tobytes() == same.tobytes()
    assert not np.array_equal(mask, vessel_picture(6, 40, 56)[1])


def test_a_mask_is_the_pixels_whose_middle_lies_in_a_vessel() -> None:
    upright = np.array([[0.0, 0.5, 1.0, 0.5, 0.25]])  # along x = 4 of 8, radius 2
    assert draw_mask(upright, 8, 8).tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]] * 8
    dot = np.array([[0.5, 0.5, 0.5, 0.5, 0.2]])  # a disc of radius 1 around the middle of 5 x 5
    cross = [[0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    assert draw_mask(dot, 5, 5).tolist() == cross


def test_a_tree_outside_the_square_is_cut_off_and_the_square_is_centred() -> None:
    across = np.array([[0.5, -2.0, 0.5, 3.0, 0.25]])
    assert draw_mask(across, 4, 8).tolist() == [[0] * 8, [1] * 8, [1] * 8, [0] * 8]
    far = across + np.array([5, 5, 5, 5, 0])
    assert draw_mask(far, 4, 8).sum() == 0


@pytest.mark.parametrize("seed", range(4))
def test_one_tree_covers_the_same_part_at_every_size(seed: int) -> None:
    tree = grow(seed)
    small, large = (draw_mask(tree, side, side).mean() for side in (128, 512))
    assert 0.04 < large < 0.35
    assert abs(small - large) < 0.02 * large + 0.002


def test_radii_follow_murrays_law_down_to_the_least() -> None:
    how = Vessels(trunks=1, width=0.02, least=0.004)
    radii = list(dict.fromkeys(grow(1, how)[:, 4].tolist()))
    assert all(0.004 <= radius <= 0.02 for radius in radii)
    trunk, wide, thin = radii[:3]
    assert wide**3 + thin**3 == pytest.approx(trunk**3)


def test_vessels_are_darker_than_what_surrounds_them() -> None:
    for colour in (True, False):
        picture, mask = vessel_picture(2, 96, 96, Vessels(colour=colour))
        green = picture[..., 1] if colour else picture
        assert picture.dtype == np.float32
        assert 0 <= picture.min() <= picture.max() <= 1
        assert green[mask == 1].mean() < 0.88 * green[mask == 0].mean()


def test_the_background_is_no_flat_field_and_the_noise_can_be_left_out() -> None:
    still, mask = vessel_picture(2, 96, 96, Vessels(noise=0))
    noisy, _ = vessel_picture(2, 96, 96)
    assert still[mask == 0][:, 1].std() > 0.01
    assert not np.array_equal(still, noisy)
    assert vessel_picture(2, 96, 96, Vessels(noise=0))[0].tobytes() == still.tobytes()


@pytest.mark.parametrize(
    "wrong",
    [{"trunks": 0}, {"width": 0.001}, {"contrast": 0.0}, {"noise": -1.0}, {"length": 0.0}],
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(AdaptError, match=f"vessels: {next(iter(wrong))}="):
        Vessels(**wrong)


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(AdaptError, match="0 x 4 is not allowed"):
        vessel_picture(0, 0, 4)
