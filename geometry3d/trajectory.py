"""How well estimated cameras fit true ones: ATE, RPE, and the relative poses of all pairs.

All poses are camera to world, [n, 4, 4]; everything is computed in fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import AdaptError
from .cameras import inverse_poses
from .rotations import angle_of
from .similarity import Moments, Similarity

STRAIGHT = 0.01
"""Below this second spread, as a share of the first, a motion counts as a straight line."""


@dataclass(frozen=True)
class AbsoluteError:
    """ATE, in units of the truth, and what it rests on.

    The less than four views there are, the more of any error the fit hides; so `views` is part of
    the result. With `straight`, the turn about the line of motion is undetermined: the ATE is
    right, but `alignment` must not be used to move anything else.
    """

    rmse: float
    median: float
    views: int
    straight: bool
    alignment: Similarity


def ate(estimate: Tensor, truth: Tensor, scaled: bool = True) -> AbsoluteError:
    """sqrt(mean_i |y_i - (s R x_i + t)|^2) of the camera centres x_i, y_i after the best fit.

    The fit is Umeyama's: a similarity, or with scaled=False a rigid motion (s = 1), for estimates
    that claim to be metric.

    Raises AdaptError where the numbers of views differ or the true cameras stand in one place.

    >>> truth = torch.eye(4).repeat(4, 1, 1)
    >>> truth[:, :3, 3] = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    >>> twice = truth.clone()
    >>> twice[:, :3, 3] *= 2
    >>> ate(twice, truth).rmse < 1e-9, ate(twice, truth, scaled=False).rmse
    (True, 0.7071067811865476)
    """
    x, y = (poses[:, :3, 3] for poses in _checked(estimate, truth))
    spreads = torch.linalg.svdvals(y - y.mean(0))
    if not spreads[0] > 1e-9 * y.abs().max():
        raise AdaptError("the true cameras stand in one place: there is no trajectory to compare")
    alignment = _fit(x, y, scaled)
    errors = (y - alignment.apply(x)).norm(dim=-1)
    rmse, straight = float(errors.square().mean().sqrt()), bool(spreads[1] < STRAIGHT * spreads[0])
    return AbsoluteError(rmse, float(errors.quantile(0.5)), len(x), straight, alignment)


def _checked(estimate: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    if estimate.shape != truth.shape or estimate.shape[1:] != (4, 4) or len(truth) == 0:
        raise AdaptError(
            f"estimated poses {list(estimate.shape)} cannot be compared with true poses"
            f" {list(truth.shape)}: both are [n, 4, 4]"
        )
    if not (estimate.isfinite().all() and truth.isfinite().all()):
        raise AdaptError("poses with numbers that are not finite cannot be compared")
    return estimate.double(), truth.double()


def _fit(x: Tensor, y: Tensor, scaled: bool) -> Similarity:
    """About the centres, and without asking for a plane: the errors do not depend on the turn."""
    a, b = x.mean(0), y.mean(0)
    if scaled and not (x - a).abs().max() > 0:
        return Similarity(x.new_zeros(()), torch.eye(3, dtype=x.dtype), b)  # nothing fits a point
    found = Moments.of(x - a, y - b, x.new_ones(len(x))).similarity(scaled)
    return Similarity(
        found.scale, found.rotation, found.translation + b - found.scale * (found.rotation @ a)
    )


@dataclass(frozen=True)
class RelativeError:
    """RPE: root mean squares over steps; translation in units of the truth, rotation in degrees."""

    translation: float
    rotation: float


def rpe(estimate: Tensor, truth: Tensor, delta: int = 1, scale: float = 1.0) -> RelativeError:
    """E_i = (Q_i^-1 Q_i+d)^-1 (P_i^-1 P_i+d) over all steps of d views, truth Q, estimate P.

    The estimate's translations are multiplied by `scale` before: for an estimate of unknown scale
    take the one of `ate(...).alignment`.

    Raises AdaptError where there are not more views than `delta`.
    """
    p, q = _checked(estimate, truth)
    if not 1 <= delta < len(p):
        raise AdaptError(f"steps of {delta} views need more than {len(p)} views")
    p = p.clone()
    p[:, :3, 3] *= scale
    steps = [inverse_poses(x[:-delta]) @ x[delta:] for x in (p, q)]
    error = inverse_poses(steps[1]) @ steps[0]
    translation = error[:, :3, 3].norm(dim=-1)
    rotation = angle_of(error[:, :3, :3]).rad2deg()
    return RelativeError(*(float(x.square().mean().sqrt()) for x in (translation, rotation)))


@dataclass(frozen=True, eq=False)
class PairErrors:
    """Errors in degrees of the relative pose of every ordered pair of views (i, j), i != j.

    `translation` is NaN for pairs without a baseline in the truth, where no direction is defined:
    `skipped` counts them, RTA and AUC leave them out.
    """

    rotation: Tensor  # [m]
    translation: Tensor  # [m]

    @property
    def skipped(self) -> int:
        return int(self.translation.isnan().sum())

    def rra(self, degrees: float) -> float:
        """The share of pairs whose relative rotation is off by less than so many degrees."""
        return _share(self.rotation, degrees)

    def rta(self, degrees: float) -> float:
        """The share of pairs whose direction of translation is off by less."""
        return _share(self.translation[~self.translation.isnan()], degrees)

    def auc(self, degrees: int = 30) -> float:
        """The mean of the shares below 1, 2, ... degrees, of the larger of both errors."""
        kept = ~self.translation.isnan()
        return area(torch.maximum(self.rotation, self.translation)[kept], degrees)


def pair_errors(estimate: Tensor, truth: Tensor) -> PairErrors:
    """Relative poses P_i^-1 P_j against the true ones, for all ordered pairs.

    Rotation: the angle of R_ij R*_ij^T. Translation: the angle between t_ij and t*_ij with its sign
    (not min(a, 180 - a), as older scorers take); both orders of a pair count, since the direction
    is seen from the first camera, so that the order of views changes nothing. Baselines below 1e-6
    of the longest true one count as none; an estimate without a baseline is 180 degrees off.

    Raises AdaptError below two views.
    """
    p, q = _checked(estimate, truth)
    if len(p) < 2:
        raise AdaptError("one view has no relative poses: at least two are needed")
    i, j = torch.nonzero(~torch.eye(len(p), dtype=torch.bool), as_tuple=True)
    found, wanted = (inverse_poses(x)[i] @ x[j] for x in (p, q))
    rotation = angle_of(found[:, :3, :3].mT @ wanted[:, :3, :3]).rad2deg()
    a, b = found[:, :3, 3], wanted[:, :3, 3]
    angle = torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1)).rad2deg()
    shortest = [1e-6 * x.norm(dim=-1).max() for x in (a, b)]
    angle = torch.where(a.norm(dim=-1) > shortest[0], angle, 180.0)
    return PairErrors(rotation, torch.where(b.norm(dim=-1) > shortest[1], angle, torch.nan))


def area(errors: Tensor, degrees: int = 30) -> float:
    """Mean over the whole thresholds t = 1..degrees of the share of errors strictly below t.

    >>> area(torch.full((10,), 15.0))  # below 16, ..., 30
    0.5
    """
    thresholds = torch.arange(1, degrees + 1, dtype=errors.dtype)
    below = (errors < thresholds[:, None]).to(errors.dtype)
    return float(below.mean()) if len(errors) else math.nan


def _share(errors: Tensor, degrees: float) -> float:
    return float((errors < degrees).double().mean()) if len(errors) else math.nan
