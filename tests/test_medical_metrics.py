"""Scores of masks: by hand, against brute force, and what empty masks count."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from polyadapt.core.errors import AdaptError
from polyadapt.vision.medical.data import ChaseDB1
from polyadapt.vision.medical.metrics import MaskScores, ceiling, means, score
from polyadapt.vision.medical.skeleton import skeleton
from polyadapt.vision.medical.vessels import draw_mask, grow
from polyadapt.vision.medical.view import View

Mask = NDArray[np.uint8]
EMPTY = np.zeros((6, 8), dtype=np.uint8)


def box(top: int, left: int, bottom: int, right: int, like: Mask = EMPTY) -> Mask:
    mask = np.zeros_like(like)
    mask[top:bottom, left:right] = 1
    return mask


def test_a_mask_fits_itself_and_not_one_elsewhere() -> None:
    assert score(box(1, 1, 4, 5), box(1, 1, 4, 5)) == MaskScores(1, 1, 1, 0)
    apart = score(box(0, 0, 6, 2), box(0, 6, 6, 8))
    assert (apart.dice, apart.iou, apart.cldice, apart.hd95) == (0, 0, 0, 6)


def test_scores_of_two_boxes_by_hand() -> None:
    # 8 and 16 pixels, 8 in common; on the left, the border of the larger is at most 2 away.
    got = score(box(1, 1, 5, 3), box(1, 1, 5, 5))
    assert got.dice == pytest.approx(16 / 24)
    assert got.iou == pytest.approx(8 / 16)
    assert got.hd95 == pytest.approx(2)


def test_centre_lines_count_length_and_not_width() -> None:
    long = np.zeros((40, 9), dtype=np.uint8)
    line, half, wide = box(0, 4, 40, 5, long), box(0, 4, 20, 5, long), box(0, 3, 40, 6, long)
    # All of the half line lies in the line, half of the line in the half line.
    assert score(half, line).cldice == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert score(wide, line).cldice == 1
    assert score(wide, line).dice == pytest.approx(0.5)


def test_nothing_for_nothing_is_right() -> None:
    assert score(EMPTY, EMPTY) == MaskScores(1, 1, 1, 0, empty=2)


def test_nothing_for_something_is_as_far_off_as_the_picture_is_long() -> None:
    for pair in ((EMPTY, box(1, 1, 3, 3)), (box(1, 1, 3, 3), EMPTY)):
        assert score(*pair) == MaskScores(0, 0, 0, 10.0, empty=1)  # 6 x 8
    assert score(EMPTY, box(1, 1, 3, 3), spacing=(2.0, 0.5)).hd95 == math.hypot(12, 4)


def test_predicting_nothing_does_not_better_the_mean() -> None:
    target = box(1, 1, 5, 4)
    poor = [score(box(1, 1, 5, 8), target), score(box(0, 0, 6, 8), target)]
    silent = [poor[0], score(EMPTY, target)]
    assert means(silent)["hd95"] > means(poor)["hd95"]
    assert means(silent)["dice"] < means(poor)["dice"]
    assert (means(silent)["one_empty"], means(silent)["pictures"]) == (1, 2)


def test_a_mean_of_no_picture_is_refused() -> None:
    with pytest.raises(AdaptError, match="no picture"):
        means([])


def test_masks_of_two_sizes_are_refused() -> None:
    with pytest.raises(AdaptError, match=r"\[3, 3\] cannot be scored against one of \[6, 8\]"):
        score(np.ones((3, 3), dtype=np.uint8), EMPTY)


def brute_hd95(p: Mask, t: Mask, spacing: tuple[float, float]) -> float:
    """From every border pixel to every one of the other border."""
    borders = [np.argwhere(m - ndimage.binary_erosion(m).astype(np.uint8)) for m in (p, t)]
    gaps = (borders[0][:, None] - borders[1][None]) * np.array(spacing)
    distances = np.hypot(gaps[..., 0], gaps[..., 1])
    both = (np.percentile(distances.min(axis=axis), 95) for axis in (0, 1))
    return float(max(both))


@pytest.mark.parametrize("seed", range(6))
def test_the_hausdorff_distance_is_that_of_brute_force(seed: int) -> None:
    draw = np.random.default_rng(seed)
    p, t = (
        (ndimage.gaussian_filter(draw.standard_normal((32, 32)), 2) > 0.02).astype(np.uint8)
        for _ in range(2)
    )
    for spacing in ((1.0, 1.0), (0.5, 2.0)):
        assert score(p, t, spacing).hd95 == pytest.approx(brute_hd95(p, t, spacing), rel=1e-5)


# Centre lines


def test_a_thick_line_becomes_its_middle() -> None:
    thick = np.zeros((7, 30), dtype=np.uint8)
    thick[1:6] = 1
    thin = skeleton(thick)
    assert thin[:, 3:27].sum(axis=0).tolist() == [1] * 24
    assert thin[3, 3:27].all()


def test_what_is_thin_or_a_dot_stays() -> None:
    thin = np.eye(9, dtype=np.uint8)
    assert np.array_equal(skeleton(thin), thin)
    dot = box(3, 3, 4, 4)
    assert np.array_equal(skeleton(dot), dot)
    assert skeleton(box(2, 2, 4, 4)).sum() >= 1


@pytest.mark.parametrize("seed", range(5))
def test_a_skeleton_hangs_together_as_its_mask_did(seed: int) -> None:
    noise = np.random.default_rng(seed).standard_normal((60, 70))
    blobs = (ndimage.gaussian_filter(noise, 1.2) > 0.05).astype(np.uint8)
    for mask in (blobs, draw_mask(grow(seed), 96, 96)):
        thin = skeleton(mask)
        assert not (thin > mask).any()
        assert thin.sum() < 0.8 * mask.sum()
        touching = np.ones((3, 3))
        labels, count = ndimage.label(mask, touching)
        assert ndimage.label(thin, touching)[1] == count
        assert set(np.unique(labels[thin == 1])) == set(range(1, count + 1))
        # No hole opens or closes: beyond the border, all is background.
        around, still = (ndimage.label(np.pad(m, 1) == 0)[1] for m in (mask, thin))
        assert around == still


# The square and back


def test_a_perfect_mask_in_a_square_of_the_same_resolution_is_perfect() -> None:
    mask = draw_mask(grow(1), 60, 90)
    assert ceiling(mask, View.sam(90)) == MaskScores(1, 1, 1, 0)
    assert ceiling(mask, View.sam(180)).dice == 1
    assert ceiling(mask, View.sam(30)).dice < 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "whole", "dice"), [(256, False, 0.91), (256, True, 0.87), (512, False, 0.96)]
)
def test_a_perfect_answer_in_a_square_is_not_perfect_on_real_vessels(
    shared_data: Path, side: int, whole: bool, dice: float
) -> None:
    data = ChaseDB1(str(shared_data / "chasedb1_small.zip"))
    data.setup()
    masks = [case.read()[1] for case in data.cases("train")[::4]]
    got = means([ceiling(mask, View.sam(side), whole) for mask in masks])
    assert got["dice"] == pytest.approx(dice, abs=0.015)
