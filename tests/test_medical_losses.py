"""Losses of masks: MONAI's against hand-worked sums, and SALT's as its code has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.vision.medical.losses import (
    CentreLineDice,
    DiceCE,
    DiceFocal,
    Loss,
    SALTReleased,
)

# Probabilities 0.5 and 0.9 on a row of two pixels, of which the second is marked.
P = torch.tensor([0.5, 0.9]).view(1, 1, 1, 2)
LOGITS, TARGET = P.logit(), torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
EVERY = [DiceCE(), DiceFocal(), CentreLineDice(ce=1.0), SALTReleased()]
by_loss = pytest.mark.parametrize("loss", EVERY, ids=lambda loss: type(loss).__name__)


def test_dice_and_cross_entropy_are_the_sums_by_hand() -> None:
    dice = 1 - 2 * 0.9 / (1.4 + 1)
    ce = -(torch.tensor(0.5).log() + torch.tensor(0.9).log()) / 2
    assert DiceCE(ce=0.0)(LOGITS, TARGET) == pytest.approx(dice, abs=1e-5)
    assert DiceCE(dice=0.5, ce=2.0)(LOGITS, TARGET) == pytest.approx(
        0.5 * dice + 2 * float(ce), abs=1e-5
    )


def test_the_focal_term_is_the_sum_by_hand() -> None:
    """gamma 2, alpha 0.75: 0.25 * 0.5^2 * log 2 and 0.75 * 0.1^2 * -log 0.9."""
    missed, found = 0.25 * 0.25 * 0.693147, 0.75 * 0.01 * 0.105361
    focal = DiceFocal(dice=0.0, alpha=0.75)(LOGITS, TARGET)
    assert focal == pytest.approx((missed + found) / 2, abs=1e-6)


def test_over_a_batch_the_pixels_of_all_pictures_are_one_sum() -> None:
    """One picture is wholly found, of the other nothing: the mean of 0 and 1, or 1 - 4 / 5."""
    target = torch.tensor([[1.0, 1.0], [1.0, 0.0]]).view(2, 1, 1, 2)
    logits = torch.tensor([[30.0, 30.0], [-30.0, -30.0]]).view(2, 1, 1, 2)
    assert DiceCE(ce=0.0)(logits, target) == pytest.approx(0.5, abs=1e-4)
    assert DiceCE(ce=0.0, batch=True)(logits, target) == pytest.approx(1 - 4 / 5, abs=1e-4)


def test_a_broken_line_costs_more_centre_line_than_overlap() -> None:
    target = torch.zeros(1, 1, 9, 9)
    target[:, :, 3:6] = 1
    broken = (target * 60 - 30).clone()
    broken[..., 4] = -30
    thin = (target * 60 - 30).clone()
    thin[:, :, 3, :3] = -30  # as many pixels, at the border
    overlap, lines = CentreLineDice(lines=0.0), CentreLineDice(lines=1.0)
    assert overlap(broken, target) == pytest.approx(float(overlap(thin, target)), abs=1e-6)
    assert lines(broken, target) > lines(thin, target)


def test_salt_s_second_sigmoid_is_in_the_cross_entropy_alone() -> None:
    dice = 1 - (2 * 0.9 + 1) / (1.4 + 1 + 1)
    twice = F.binary_cross_entropy_with_logits(P, TARGET, reduction="none").flatten()
    focal = (0.25 * 0.5**3 * twice[0] + 0.75 * 0.1**3 * twice[1]) / 2
    assert SALTReleased()(LOGITS, TARGET) == pytest.approx(dice + float(focal), abs=1e-6)


def test_salt_as_released_hardly_pulls_at_what_is_sure_and_wrong() -> None:
    """What the double sigmoid costs: the repaired loss's gradient there is far larger."""
    pulls = []
    for loss in (SALTReleased(), DiceFocal(gamma=3.0, alpha=0.75, smooth=1.0, batch=True)):
        logits = torch.full((1, 1, 4, 4), -8.0, requires_grad=True)
        loss(logits, torch.ones(1, 1, 4, 4)).backward()
        assert logits.grad is not None
        pulls.append(float(logits.grad.abs().sum()))
    assert pulls[1] > 100 * pulls[0]


@by_loss
@pytest.mark.parametrize("marked", [0.0, 1.0])
def test_an_empty_or_full_mask_has_a_finite_loss_that_pulls_the_right_way(
    loss: Loss, marked: float
) -> None:
    target = torch.full((2, 1, 8, 8), marked)
    logits = torch.zeros(2, 1, 8, 8, requires_grad=True)
    loss(logits, target).backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    assert float(logits.grad.sum()) * (0.5 - marked) > 0


@by_loss
def test_fractions_of_pixels_are_targets_too(loss: Loss) -> None:
    target = torch.rand(1, 1, 8, 8)

    def at(logits: Tensor) -> float:
        return float(loss(logits, target))

    assert at(torch.logit(target, 1e-3)) < at(torch.logit(1 - target, 1e-3))


@by_loss
def test_a_loss_is_the_same_from_its_json(loss: Loss) -> None:
    assert Loss.from_json(loss.to_json()) == loss


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"loss": "Dice"}, "names no loss; there are DiceCE, DiceFocal, CentreLineDice, SALT"),
        ({"loss": "DiceCE", "gamma": 1.0}, "DiceCE has the settings ["),
        ({"loss": "DiceCE", "ce": -1.0}, "DiceCE: ce=-1.0 is not allowed: from 0"),
        ({"loss": "DiceCE", "smooth": 0.0}, "DiceCE: smooth=0.0 is not allowed: above 0"),
        ({"loss": "DiceFocal", "alpha": 2.0}, "alpha=2.0 is not allowed: 0 to 1, or null"),
        ({"loss": "CentreLineDice", "lines": 1.5}, "lines=1.5 is not allowed: a share"),
        ({"loss": "DiceFocal", "gamma": float("nan")}, "DiceFocal: gamma=nan"),
    ],
)
def test_a_loss_that_there_is_not_is_refused_by_name(data: dict[str, Any], said: str) -> None:
    with pytest.raises(AdaptError) as refused:
        Loss.from_json(data)
    assert said in str(refused.value)
