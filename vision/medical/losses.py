"""Losses of mask logits [b, 1, s, s] against masks of shares from 0 to 1: MONAI's, and SALT's."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.backbone import one_of_kinds
from ...core.errors import AdaptError
from ...core.recipe import require_finite


@dataclass(frozen=True, kw_only=True)
class Loss(ABC):
    """A loss as plain settings, which a configuration names and an adapter file holds.

    >>> Loss.from_json(DiceFocal(gamma=3.0).to_json())
    DiceFocal(dice=1.0, focal=1.0, gamma=3.0, alpha=None, smooth=1e-05, batch=False)
    """

    @abstractmethod
    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits and masks [b, 1, s, s] -> a scalar."""

    @staticmethod
    def kinds() -> dict[str, type[Loss]]:
        """The losses by name, in the order of their definition."""
        return {kind.__name__: kind for kind in Loss.__subclasses__()}

    def to_json(self) -> dict[str, Any]:
        """The kind of loss and its settings as JSON values."""
        return {"loss": type(self).__name__, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Loss:
        """What `to_json` wrote; an unknown kind or setting is refused by name."""
        return one_of_kinds("loss", Loss.kinds(), data)


def _require(name: str, above_zero: Mapping[str, float], from_zero: Mapping[str, float]) -> None:
    require_finite(name, **above_zero, **from_zero)
    for setting, value in {**above_zero, **from_zero}.items():
        if value < 0 or (value == 0 and setting in above_zero):
            allowed = "above 0" if setting in above_zero else "from 0"
            raise AdaptError(f"{name}: {setting}={value} is not allowed: {allowed}")


@dataclass(frozen=True, kw_only=True)
class DiceCE(Loss):
    """`dice` D + `ce` times the mean binary cross entropy (MONAI's DiceCELoss).

    With p the probabilities and t the masks, D = 1 - (2 sum(p t) + e) / (sum(p) + sum(t) + e), for
    each picture, or with `batch` over all pixels of the batch at once; e is `smooth`. D is least
    where p is 0 or 1, the cross entropy where p = t.

    >>> logits = torch.full((1, 1, 2, 2), -30.0)  # a sure "nothing"
    >>> float(DiceCE()(logits, torch.zeros(1, 1, 2, 2)))
    0.0
    """

    dice: float = 1.0
    ce: float = 1.0
    smooth: float = 1e-5
    batch: bool = False

    def __post_init__(self) -> None:
        _require("DiceCE", {"smooth": self.smooth}, {"dice": self.dice, "ce": self.ce})

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        from monai.losses.dice import DiceCELoss

        loss: Tensor = DiceCELoss(
            sigmoid=True,
            batch=self.batch,
            smooth_nr=self.smooth,
            smooth_dr=self.smooth,
            lambda_dice=self.dice,
            lambda_ce=self.ce,
        )(logits, target)
        return loss


@dataclass(frozen=True, kw_only=True)
class DiceFocal(Loss):
    """`dice` D + `focal` times the mean of alpha_t (1 - p_t)^gamma times the cross entropy.

    MONAI's DiceFocalLoss (focal loss: arXiv 1708.02002); D as in `DiceCE`, p_t = p where t = 1 and
    1 - p where t = 0, alpha_t = `alpha` t + (1 - alpha) (1 - t), or 1 without an alpha. With gamma
    3, alpha 0.75, smooth 1 and `batch` it is what SALT's authors (arXiv 2503.16055) meant; see
    `SALTReleased` for what their code does.
    """

    dice: float = 1.0
    focal: float = 1.0
    gamma: float = 2.0
    alpha: float | None = None
    smooth: float = 1e-5
    batch: bool = False

    def __post_init__(self) -> None:
        weights = {"dice": self.dice, "focal": self.focal, "gamma": self.gamma}
        _require("DiceFocal", {"smooth": self.smooth}, weights)
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise AdaptError(f"DiceFocal: alpha={self.alpha} is not allowed: 0 to 1, or null")

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        from monai.losses.dice import DiceFocalLoss

        loss: Tensor = DiceFocalLoss(
            sigmoid=True,
            batch=self.batch,
            smooth_nr=self.smooth,
            smooth_dr=self.smooth,
            gamma=self.gamma,
            alpha=self.alpha,
            lambda_dice=self.dice,
            lambda_focal=self.focal,
        )(logits, target)
        return loss


@dataclass(frozen=True, kw_only=True)
class CentreLineDice(Loss):
    """(1 - `lines`) D + `lines` (1 - clDice) + `ce` times the cross entropy, for thin structures.

    MONAI's SoftDiceclDiceLoss (arXiv 2003.07311): clDice compares each mask with the soft centre
    lines of the other; `steps` erosions find them, which should reach half the width of the widest
    structure in pixels of the view. Its terms are smoothed by 1. Both are of probabilities; the
    cross entropy is ours to add.
    """

    lines: float = 0.5
    steps: int = 3
    ce: float = 0.0

    def __post_init__(self) -> None:
        _require("CentreLineDice", {}, {"lines": self.lines, "steps": self.steps, "ce": self.ce})
        if self.lines > 1:
            raise AdaptError(f"CentreLineDice: lines={self.lines} is not allowed: a share, 0 to 1")

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        from monai.losses.cldice import SoftDiceclDiceLoss

        both = SoftDiceclDiceLoss(iter_=self.steps, alpha=self.lines, sigmoid=True)
        loss: Tensor = both(logits, target)
        if self.ce:
            loss = loss + self.ce * F.binary_cross_entropy_with_logits(logits, target)
        return loss


@dataclass(frozen=True, kw_only=True)
class SALTReleased(Loss):
    """The loss of SALT's released code (arXiv 2503.16055), its second sigmoid included.

    D over the whole batch, smoothed by 1, plus the mean of alpha_t (1 - p_t)^3 times the binary
    cross entropy, alpha = 0.75. That code hands its cross entropy, which takes logits, the
    probabilities p: the probability in it is sigmoid(p), from 0.5 to 0.73, so that a sure and wrong
    pixel costs no more than log 2 or 1.31 and has next to no gradient. Kept as it is, to compare
    with that code; `DiceFocal(gamma=3.0, alpha=0.75, smooth=1.0, batch=True)` has one sigmoid.
    Written from notes on the code; that the focal term is averaged, not summed, is our reading.

    >>> sure, all_marked = torch.full((1, 1, 2, 2), -30.0), torch.ones(1, 1, 2, 2)
    >>> round(float(SALTReleased()(sure, all_marked)), 4)  # 1 - 1 / 5 + 0.75 log 2
    1.3199
    """

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        p = torch.sigmoid(logits.float())
        dice = 1 - (2 * (p * target).sum() + 1) / ((p + target).sum() + 1)
        right = p * target + (1 - p) * (1 - target)
        share = 0.75 * target + 0.25 * (1 - target)
        twice = F.binary_cross_entropy_with_logits(p, target, reduction="none")
        return dice + (share * (1 - right) ** 3 * twice).mean()
