"""Unit quaternions (w, x, y, z) of rotation matrices and back, as files of poses have them."""

from __future__ import annotations

import torch
from torch import Tensor


def quaternion_of(rotation: Tensor) -> Tensor:
    """[..., 3, 3] -> [..., 4]: w, x, y, z with w of at least 0.

    >>> quaternion_of(torch.diag(torch.tensor([1.0, -1, -1]))).round(decimals=4).abs().tolist()
    [0.0, 1.0, 0.0, 0.0]
    """
    m = [[rotation[..., i, j] for j in range(3)] for i in range(3)]
    x, y, z = m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]
    xy, xz, yz = m[1][0] + m[0][1], m[0][2] + m[2][0], m[2][1] + m[1][2]
    a, b, c = m[0][0], m[1][1], m[2][2]
    # 4 q q^T: each row is q, some times too long. The longest row keeps most digits.
    rows = [[1 + a + b + c, x, y, z], [x, 1 + a - b - c, xy, xz]]
    rows += [[y, xy, 1 - a + b - c, yz], [z, xz, yz, 1 - a - b + c]]
    outer = torch.stack([torch.stack(row, -1) for row in rows], -2)
    longest = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    q: Tensor = outer.gather(-2, longest.expand(*longest.shape[:-1], 4))[..., 0, :]
    unit: Tensor = q / q.norm(dim=-1, keepdim=True)
    return unit * torch.where(q[..., :1] < 0, -1.0, 1.0)


def rotation_from(quaternion: Tensor) -> Tensor:
    """w, x, y, z [..., 4] of any length but 0 -> [..., 3, 3].

    >>> rotation_from(torch.tensor([2.0, 0, 0, 2])).round().int().tolist()
    [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    """
    w, x, y, z = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
    ]
    return torch.stack(rows, -2)
