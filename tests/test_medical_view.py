"""What a SAM sees of a picture, how training varies it, and the way back to its own size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyadapt.core.errors import AdaptError
from polyadapt.vision.medical.changes import Augmentation, random_crop, varied
from polyadapt.vision.medical.vessels import draw_mask, grow
from polyadapt.vision.medical.view import SAM_MEAN, SAM_STD, View

RAMP = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)


def test_sam_pads_after_its_normalisation() -> None:
    seen = View.sam(4)(RAMP)
    want = (torch.from_numpy(RAMP).float() - torch.tensor(SAM_MEAN)) / torch.tensor(SAM_STD)
    assert torch.allclose(seen[:, :2], want.permute(2, 0, 1))
    assert not seen[:, 2:].any()


def test_medsam_sees_every_picture_from_0_to_1() -> None:
    seen = View.medsam(4)(RAMP + np.uint8(100))
    assert torch.allclose(seen[:, :2].permute(1, 2, 0), torch.from_numpy(RAMP) / 23)
    assert not seen[:, 2:].any()
    assert not View.medsam(4)(np.full_like(RAMP, 7)).any()


def test_salt_counts_the_padding_and_has_its_slip_in_red() -> None:
    seen = View.salt(4)(RAMP + np.uint8(100))  # the padding is the darkest: 0
    std = torch.tensor([53.395, 57.12, 57.375])
    want = (torch.from_numpy(RAMP + 100.0) * 255 / 123 - torch.tensor(SAM_MEAN)) / std
    assert torch.allclose(seen[:, :2].permute(1, 2, 0), want.float(), atol=1e-5)
    assert torch.allclose(seen[:, 3, 3], -torch.tensor(SAM_MEAN) / std)


@pytest.mark.parametrize(("height", "width"), [(48, 96), (96, 40), (96, 96), (1, 96)])
@pytest.mark.parametrize("times", [1, 2])
def test_there_and_back_a_mask_is_itself(height: int, width: int, times: int) -> None:
    mask = draw_mask(grow(2), height, width)
    view = View.sam(96 * times)
    back = view.native(view.mask(mask) - 0.5, (height, width))
    assert np.array_equal((back[0] > 0).numpy(), mask == 1)


def test_a_pixel_of_the_square_is_marked_from_half_of_its_area_on() -> None:
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]], dtype=np.uint8)
    assert View.sam(2).shares(mask)[0].tolist() == [
        [pytest.approx(0.75, abs=0.01), pytest.approx(0.25, abs=0.01)],
        [1, pytest.approx(0.25, abs=0.01)],
    ]
    assert View.sam(2).mask(mask)[0].tolist() == [[1, 0], [1, 0]]


def test_logits_of_any_resolution_and_in_batches_come_back() -> None:
    view = View.sam(64)
    logits = torch.full((2, 1, 16, 16), -3.0)
    logits[..., :8] = 3.0  # the left half of the square, all of a picture half as wide
    assert view.native(logits, (100, 50)).shape == (2, 1, 100, 50)
    assert (view.native(logits, (100, 40)) > 0).all()
    assert (view.native(logits, (100, 100)) > 0).float().mean() == pytest.approx(0.5, abs=0.02)


def test_a_view_travels_as_json() -> None:
    for view in (View.sam(), View.medsam(), View.salt()):
        assert View.from_json(view.to_json()) == view
    with pytest.raises(AdaptError, match="'size' is unknown or missing"):
        View.from_json(View.sam().to_json() | {"size": 3})
    with pytest.raises(AdaptError, match="side=0"):
        View(side=0)
    with pytest.raises(AdaptError, match="deviations above 0"):
        View(std=(1, 0, 1))


@pytest.mark.parametrize("how", ["flip", "turns", "salt"])
def test_a_picture_and_its_mask_are_varied_together(how: Augmentation) -> None:
    mask = draw_mask(grow(4), 40, 40)
    pixels = np.repeat(mask[..., None] * np.uint8(120) + np.uint8(60), 3, axis=-1)
    seen = [varied(pixels, mask, how, (0, epoch, 0)) for epoch in range(12)]
    assert len({marked.tobytes() for _, marked in seen}) > 1
    for changed, marked in seen:
        bright = changed[..., 0] > int(changed.max()) * 2 / 3  # marked is 180, the rest 60
        assert set(np.unique(marked)) == {0, 1}
        assert np.mean(bright != (marked == 1)) < (0.06 if how == "salt" else 1e-9)


def test_the_brightness_of_salt_only_rises() -> None:
    pixels = np.full((4, 4, 3), 50, dtype=np.uint8)
    mask = np.zeros((4, 4), dtype=np.uint8)
    middle = {int(varied(pixels, mask, "salt", (0, n, 0))[0][2, 2, 0]) for n in range(40)}
    assert min(middle) == 50
    assert 90 < max(middle) <= 100


def test_a_crop_is_a_square_of_native_pixels_that_the_picture_has() -> None:
    rows = np.arange(20, dtype=np.uint8)[:, None] * np.ones(30, dtype=np.uint8)
    pixels = np.repeat(rows[..., None], 3, axis=-1)
    tops = set()
    for epoch in range(60):
        seen, marked = random_crop(pixels, rows, 8, (0, epoch, 0))
        assert seen.shape == (8, 8, 3)
        assert np.array_equal(seen[..., 0], marked)
        tops.add(int(marked[0, 0]))
    assert tops == set(range(13))
    assert random_crop(pixels, rows, 25, (0, 0, 0))[1].shape == (20, 25)
