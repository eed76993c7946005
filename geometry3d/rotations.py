"""Rotations in space as vectors: the axis, as long as the angle in radians."""

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
    """The rotation matrix of a rotation vector: [..., 3] -> [..., 3, 3] (Rodrigues).

    >>> rotation_of(torch.tensor([0.0, 0.0, torch.pi / 2])).round().int().tolist()
    [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    """
    angle = vector.norm(dim=-1)[..., None, None]
    across = cross_matrix(vector)
    half = torch.sinc(angle / (2 * torch.pi))  # sin(angle / 2) / (angle / 2)
    eye = torch.eye(3, dtype=vector.dtype, device=vector.device)
    return eye + torch.sinc(angle / torch.pi) * across + half.square() / 2 * across @ across


def angle_of(rotation: Tensor) -> Tensor:
    """By how many radians it turns, 0 to pi, [..., 3, 3] -> [...].

    From sine and cosine together, so that angles near 0 and near pi keep their digits.

    >>> round(angle_of(rotation_of(torch.tensor([0.0, 3.0, 0.0]))).item(), 4)
    3.0
    """
    return torch.atan2(_twice_the_sine(rotation).norm(dim=-1), _trace(rotation) - 1)


def vector_of(rotation: Tensor) -> Tensor:
    """The rotation vector of a rotation matrix, [..., 3, 3] -> [..., 3], at most pi long.

    At pi itself one of the two vectors that fit.

    >>> turn = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    >>> torch.allclose(vector_of(rotation_of(turn)), turn)
    True
    """
    angle, sine = angle_of(rotation)[..., None], _twice_the_sine(rotation)
    straight = sine * torch.where(angle < 1e-4, 0.5, angle / (2 * angle.sin()))
    # Near half a turn the sine vanishes; the even part, cos I + (1 - cos) a a^T, holds the axis a
    # up to its sign.
    eye = torch.eye(3, dtype=rotation.dtype, device=rotation.device)
    outer = (rotation + rotation.mT) / 2 - angle.cos()[..., None] * eye
    longest = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    axis = outer.gather(-1, longest.expand(*outer.shape[:-1], 1))[..., 0]
    axis = axis / axis.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    axis = axis * torch.where((axis * sine).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return torch.where(angle < 3.0, straight, axis * angle)


def _twice_the_sine(rotation: Tensor) -> Tensor:
    """2 sin(angle) * axis: what is antisymmetric in the matrix."""
    odd = rotation - rotation.mT
    return torch.stack([odd[..., 2, 1], odd[..., 0, 2], odd[..., 1, 0]], -1)


def _trace(rotation: Tensor) -> Tensor:
    return rotation.diagonal(dim1=-2, dim2=-1).sum(-1)
