"""Rotary positions in two dimensions, of the kind that CroCo and DUSt3R use."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BASE = 100.0  # the published networks' ("RoPE100"); language models take 10,000


class Rotary(NamedTuple):
    """By how much to turn each number of a head: cos and sin, [tokens, head width]."""

    cos: Tensor
    sin: Tensor


def grid_positions(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """(row, column) of every token, row by row: [rows * columns, 2].

    >>> grid_positions(2, 2).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    down, across = torch.arange(rows, device=device), torch.arange(columns, device=device)
    return torch.cartesian_prod(down, across)


def rotary(positions: Tensor, head_width: int, base: float = BASE) -> Rotary:
    """The angles of tokens at `positions` [tokens, 2] for heads of a width divisible by 4.

    The first half of a head turns with the row, the second half with the column. Within a half of
    n numbers, number i and number i + n/2 are one plane, turned by position * base^(-2i/n)
    (RoPE, arXiv 2104.09864, per axis as in CroCo v2, arXiv 2211.10408).

    >>> rotary(torch.tensor([[0, 0]]), 8).cos.tolist()
    [[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    """
    half = head_width // 2
    steps = torch.arange(0, half, 2, device=positions.device, dtype=torch.float32) / half
    angles = positions.float()[:, :, None] * base**-steps  # [tokens, 2, half / 2]
    both = torch.cat([angles, angles], -1).flatten(1)
    return Rotary(both.cos(), both.sin())


def turned(heads: Tensor, by: Rotary) -> Tensor:
    """Queries or keys [..., tokens, head width], turned by their positions; lengths stay."""
    first, second = heads.unflatten(-1, (2, 2, -1)).unbind(-2)
    quarter = torch.stack([-second, first], -2).flatten(-3)
    return heads * by.cos.to(heads.dtype) + quarter * by.sin.to(heads.dtype)
