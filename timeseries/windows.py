"""Windows of a table: the past that a forecaster sees, and the rows that it forecasts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..core.errors import AdaptError
from . import borders

Window = tuple[Tensor, Tensor]


class Windows(Dataset[Window]):
    """Every window of look_back + horizon rows that lies within `rows` of `values` [rows, C].

    One channel at a time: item i is (past [L, 1], future [T, 1]) of channel i // n, where n is the
    number of windows. With joint=True an item holds all channels: (past [L, C], future [T, C]).
    A horizon of 0 leaves the future empty.

    >>> table = torch.tensor([[0.0, 10], [1, 11], [2, 12], [3, 13]])
    >>> windows = Windows(table, range(4), look_back=2, horizon=1)
    >>> len(windows), [part.flatten().tolist() for part in windows[3]]
    (4, [[11.0, 12.0], [13.0]])
    """

    def __init__(
        self, values: Tensor, rows: range, look_back: int, horizon: int, joint: bool = False
    ) -> None:
        if look_back < 1 or horizon < 0:
            raise AdaptError(f"look_back={look_back}, horizon={horizon}: from 1 and from 0")
        self.values = values
        self.rows = rows
        self.look_back = look_back
        self.horizon = horizon
        self.joint = joint
        self.starts = borders.windows(rows, look_back, horizon)

    @property
    def channels(self) -> int:
        return self.values.shape[1]

    def __len__(self) -> int:
        return self.starts * (1 if self.joint else self.channels)

    def __getitem__(self, position: int) -> Window:
        past, future = self.__getitems__([range(len(self))[position]])
        return past[0], future[0]

    def __getitems__(self, positions: Sequence[int]) -> Window:
        """A whole batch at once, pasts [b, L, c] and futures [b, T, c]: many times faster.

        A DataLoader asks for it by this name; `collate_fn=as_it_is` then leaves it alone.
        """
        places = torch.as_tensor(positions)
        length = self.look_back + self.horizon
        first = self.rows.start + (places if self.joint else places % self.starts)
        rows = first[:, None] + torch.arange(length)
        if self.joint:
            whole = self.values[rows]
        else:
            whole = self.values[rows, (places // self.starts)[:, None]].unsqueeze(-1)
        return whole[:, : self.look_back], whole[:, self.look_back :]

    def window(self, start: int) -> Window:
        """(past [L, C], future [T, C]) from row `start` of the table on, all channels."""
        last = self.rows.stop - self.look_back - self.horizon
        if not self.rows.start <= start <= last:
            raise AdaptError(
                f"no window begins at row {start}: they do from {self.rows.start} to {last}"
            )
        middle = start + self.look_back
        return self.values[start:middle], self.values[middle : middle + self.horizon]


def as_it_is(batch: Any) -> Any:
    return batch


def every_window(windows: Windows, step: int) -> list[int]:
    """The positions of every `step`-th window from the first on, of every channel.

    >>> every_window(Windows(torch.zeros(6, 2), range(6), look_back=2, horizon=1), 2)
    [0, 2, 4, 6]
    """
    groups = range(0, len(windows), windows.starts) if windows.starts else ()
    return [first + start for first in groups for start in range(0, windows.starts, step)]
