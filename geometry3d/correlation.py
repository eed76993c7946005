"""Where each place of one image is seen in the other: correlation over all cells, then refined."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

REACH = 2  # cells to each side of the best one that refine it


class Matches(NamedTuple):
    """What correlation says of the n = rows * columns cells of either image of b pairs.

    at:    [b, 2, n, 2] (column, row) in the other image's cells; a cell's middle is a whole number
    mass:  [b, 2, n] the share of all correlation in the refining window; near 1: sure
    cycle: [b, 2, n] how many cells off one arrives who goes to the match and back
    """

    at: Tensor
    mass: Tensor
    cycle: Tensor


def correlation(first: Tensor, second: Tensor, sharpness: Tensor) -> Tensor:
    """Cosines of descriptors [b, d, rows, columns], times exp(sharpness): logits [b, n, m]."""
    one = F.normalize(first.flatten(2), dim=1) * sharpness.exp()
    return one.mT @ F.normalize(second.flatten(2), dim=1)


def matched(logits: Tensor, rows: int, columns: int) -> Matches:
    """Matches of the first image's cells in the second, and of the second's in the first.

    The best cell of all is refined to the mean of the cells around it, weighted by the softmax of
    their correlation; that mean and not the choice of the cell has a gradient.
    """
    there, mass = _refined(logits, rows, columns)
    back, weight = _refined(logits.mT, rows, columns)
    cycles = [_cycle(there, back, rows, columns), _cycle(back, there, rows, columns)]
    ways = [torch.stack(both, 1) for both in ([there, back], [mass, weight], cycles)]
    return Matches(*ways)


def _refined(logits: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    best = logits.argmax(-1)
    steps = torch.arange(-REACH, REACH + 1, device=logits.device)
    # The window is moved inside, so that each has the same number of cells.
    row = (best // columns).clamp(REACH, rows - 1 - REACH)[..., None] + steps
    column = (best % columns).clamp(REACH, columns - 1 - REACH)[..., None] + steps
    cells = (row[..., :, None] * columns + column[..., None, :]).flatten(2)
    near = logits.gather(-1, cells)
    share = near.softmax(-1)
    where = torch.stack([cells % columns, cells // columns], -1)
    at = (share[..., None] * where).sum(-2)
    with torch.no_grad():
        mass = (near.logsumexp(-1) - logits.logsumexp(-1)).exp()
    return at, mass


def _cycle(there: Tensor, back: Tensor, rows: int, columns: int) -> Tensor:
    ways = back.detach().mT.unflatten(-1, (rows, columns))
    scale = there.new_tensor([columns - 1, rows - 1]) / 2
    returned = F.grid_sample(
        ways, (there.detach() / scale - 1)[:, None], padding_mode="border", align_corners=True
    )[:, :, 0].mT
    off: Tensor = (returned - cell_middles(rows, columns, there)).norm(dim=-1)
    return off


def cell_middles(rows: int, columns: int, like: Tensor) -> Tensor:
    """(column, row) of every cell, row by row, in the type and on the device of `like`: [n, 2].

    >>> cell_middles(1, 2, torch.zeros(1)).tolist()
    [[0.0, 0.0], [1.0, 0.0]]
    """
    down, across = (torch.arange(k, dtype=like.dtype, device=like.device) for k in (rows, columns))
    return torch.cartesian_prod(down, across).flip(-1)
