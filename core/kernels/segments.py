"""The rows of a batch by set: sorted, and cut into tiles that belong to one set each.

Rows stay where they are: the kernels look their places up. The names are those of the metadata of
multi-adapter serving (S-LoRA, arXiv 2311.03285; Punica's segments, arXiv 2310.18547).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALL, LARGE = 16, 64  # rows of a tile; the smaller one is the least that a matrix unit takes


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the rows of each set are, for ids that have `tokens` rows each."""

    order: Tensor  # int64 [m]: the places of the ids by set, those of one set in their order
    tiles: Tensor  # int64 [tiles, 3]: set, first row, end of the set's rows; in sorted rows
    rows: int  # of a tile


def segments(ids: Tensor, sets: int, tokens: int = 1) -> Segments:
    """ids int64 [m] of `sets` sets, each for `tokens` rows -> their tiles.

    An id that is no set's number stands for none, and none comes last, as number `sets`. No shape
    depends on the ids, so nothing waits for a GPU: tiles that are not needed end where they begin.

    >>> made = segments(torch.tensor([1, -1, 0, 1]), sets=2)
    >>> made.order.tolist(), made.tiles.tolist()
    ([2, 0, 3, 1], [[0, 0, 1], [1, 1, 3], [2, 3, 4]])
    """
    rows = LARGE if len(ids) * tokens >= LARGE * min(sets, len(ids)) else SMALL
    owner = torch.where((ids >= 0) & (ids < sets), ids, sets)
    ranked, order = owner.sort(stable=True)
    numbers = torch.arange(sets + 1, device=ids.device)
    ends = torch.searchsorted(ranked, numbers, right=True) * tokens
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    tiles = (ends - starts + rows - 1) // rows
    last = tiles.cumsum(0)
    # Full tiles, and for each set at most one that is not.
    most = len(ids) * tokens // rows + min(sets + 1, len(ids))
    program = torch.arange(most, device=ids.device)
    own = torch.searchsorted(last, program, right=True).clamp_max(sets)
    first = starts[own] + (program - last[own] + tiles[own]) * rows
    end = ends[own]
    return Segments(order, torch.stack([own, torch.minimum(first, end), end], dim=1), rows)
