"""The relative pose of two cameras from matched rays: robust Gauss-Newton on reprojection."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .rotations import cross_matrix, rotation_of

STEPS = 16
_BLUR, _SHARP = 0.2, 0.006  # of the matches, in ray units: assumed at first, and in the end
_RELIEF = 0.5  # of inverse depths around their plane, relative to their mean
_DAMPING = 1e-4
_TURN, _FURTHEST, _STEEPEST = 0.3, 1.5, 1.5  # radians a step; mean depths; inverse depth over x, y


class Pose(NamedTuple):
    """Of the second camera in the first one's frame, its centre 1 away: [b, 3, 3] and [b, 3]."""

    rotation: Tensor
    centre: Tensor


class _State(NamedTuple):
    """Lengths are in mean depths of the first image, so that a small baseline is a small number."""

    rotation: Tensor  # [b, 3, 3]
    centre: Tensor  # [b, 3]
    slope: Tensor  # [b, 2] of the inverse depth over x and y
    relief: Tensor  # [b, n] what the inverse depth is more than its plane


@torch.no_grad()
def two_view_pose(own: Tensor, other: Tensor, weights: Tensor, steps: int = STEPS) -> Pose:
    """The pose that explains where rays `own` [b, n, 3] (z = 1) are seen as `other`.

    A ray a at inverse depth q = 1 + slope . (x, y) + relief is seen along R^T (a - q t). Turn,
    centre, slope and relief are found by Gauss-Newton from none of them; the relief has a prior (0,
    +- 0.5) and is eliminated cell by cell, so that the matrices are 8 x 8. Residuals count by
    Cauchy's weights at a width that shrinks from step to step. Own design, without gradient.
    """
    batch, cells = own.shape[:2]
    state = _State(
        torch.eye(3).to(own).expand(batch, 3, 3),
        own.new_zeros(batch, 3),
        own.new_zeros(batch, 2),
        own.new_zeros(batch, cells),
    )
    for step in range(steps):
        state = _improved(state, own, other, weights, max(_BLUR * 0.5**step, _SHARP))
    return Pose(state.rotation, F.normalize(state.centre, dim=-1))


def _improved(state: _State, own: Tensor, other: Tensor, weights: Tensor, blur: float) -> _State:
    inverse = 1 + (own[..., :2] @ state.slope[..., None])[..., 0] + state.relief
    moved = own - inverse[..., None] * state.centre[:, None]
    flat, onto = _seen(moved, state.rotation)
    per_depth = -(onto @ state.centre[:, None, :, None])[..., 0]  # [b, n, 2]
    turning, shifting = onto @ cross_matrix(moved), -inverse[..., None, None] * onto
    tipping = per_depth[..., None] * own[..., None, :2]
    slopes = torch.cat([turning, shifting, tipping], -1)  # [b, n, 2, 8]
    off = other[..., :2] - flat + per_depth * state.relief[..., None]
    # The relief's freedom is part of the residual's spread: blur^2 + relief^2 k k^T, inverted.
    share = _RELIEF**2 / (blur**2 + _RELIEF**2 * per_depth.square().sum(-1, keepdim=True))
    along = (per_depth * share)[..., None] * per_depth[..., None, :]
    spread = (torch.eye(2).to(own) - along) / blur**2  # [b, n, 2, 2]
    move = _solved(slopes, off, spread, weights)
    rest = off - (slopes @ move[:, None, :, None])[..., 0]
    turn, shift, tip = move.split([3, 3, 2], -1)
    return _State(
        rotation_of(_at_most(turn, _TURN)) @ state.rotation,
        _at_most(state.centre + shift, _FURTHEST),
        _at_most(state.slope + tip, _STEEPEST),
        (share * per_depth * rest).sum(-1).clamp(-0.9, 3),
    )


def _seen(moved: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Where the second camera sees points [b, n, 3], and that place's slope over them.

    The points are relative to its centre, in the first camera's axes; [b, n, 2] and [b, n, 2, 3].
    """
    seen = moved @ rotation
    ahead = seen[..., 2:].clamp_min(0.1)
    flat = seen[..., :2] / ahead
    still = torch.eye(2).to(moved).expand(*flat.shape, 2)
    slope = torch.cat([still, -flat[..., None]], -1) / ahead[..., None]
    return flat, slope @ rotation.mT[:, None]


def _solved(slopes: Tensor, off: Tensor, spread: Tensor, weights: Tensor) -> Tensor:
    """The damped Gauss-Newton move [b, 8] of what all cells share."""
    # Far off, the spread's rounding can make a square negative: a trust without bound, then NaN.
    square = ((spread @ off[..., None])[..., 0] * off).sum(-1).clamp_min(0)
    trust = weights / (1 + square / 4)
    left = (trust[..., None, None] * (spread @ slopes)).flatten(1, 2)  # [b, 2 n, 8]
    matrix = left.mT @ slopes.flatten(1, 2)
    size = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    matrix = matrix + (_DAMPING * size + 1e-6) * torch.eye(8).to(matrix)
    moves: Tensor = torch.linalg.solve(matrix, left.mT @ off.flatten(1, 2)[..., None])
    return moves[..., 0]


def _at_most(vectors: Tensor, length: float) -> Tensor:
    """Vectors [b, k], shortened to a length: matches of no pose must not run away to infinity."""
    long: Tensor = vectors.norm(dim=-1, keepdim=True).clamp_min(length)
    return vectors * (length / long)
