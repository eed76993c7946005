"""Rotations in space: from a vector (the axis, as long as the angle in radians), and how far."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_matrix(vector: Tensor) -> Tensor:
    """[..., 3] -> [..., 3, 3] with cross_matrix(a) @ b = a x b."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    rows = [zero, -z, y, z, zero, -x, -y, x, zero]
    return torch.stack(rows, -1).reshape(*vector.shape, 3)


def rotation_of(vector: Tensor) -> Tensor:
    """The rotation matrix of a rotation vector: exp([v]x), [..., 3] -> [..., 3, 3].

    >>> rotation_of(torch.tensor([0.0, 0.0, torch.pi / 2])).round().int().tolist()
    [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    """
    return torch.matrix_exp(cross_matrix(vector))


def angle_of(rotation: Tensor) -> Tensor:
    """By how many radians it turns, 0 to pi, [..., 3, 3] -> [...].

    From sine and cosine together, so that angles near 0 and near pi keep their digits.

    >>> round(angle_of(rotation_of(torch.tensor([0.0, 3.0, 0.0]))).item(), 4)
    3.0
    """
    return torch.atan2(_twice_the_sine(rotation).norm(dim=-1), _trace(rotation) - 1)


def _twice_the_sine(rotation: Tensor) -> Tensor:
    """2 sin(angle) * axis: what is antisymmetric in the matrix."""
    odd = rotation - rotation.mT
    return torch.stack([odd[..., 2, 1], odd[..., 0, 2], odd[..., 1, 0]], -1)


def _trace(rotation: Tensor) -> Tensor:
    return rotation.diagonal(dim1=-2, dim2=-1).sum(-1)
