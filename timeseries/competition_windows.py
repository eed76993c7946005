"""One window of each of many series: its end, or a place drawn anew in every epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from .series import Values
from .windows import Window


class LastWindows(Dataset[Window]):
    """The end of every past [L, 1], and what came then [T, 1].

    A past that is shorter than the look-back is filled up in front with its first value.
    """

    def __init__(self, pasts: Sequence[Values], futures: Sequence[Values], look_back: int) -> None:
        self.pasts = pasts
        self.futures = futures
        self.look_back = look_back

    def __len__(self) -> int:
        return len(self.pasts)

    def __getitem__(self, position: int) -> Window:
        past = last(self.pasts[position], self.look_back)
        return _column(past), _column(self.futures[position])


class DrawnWindows(Dataset[Window]):
    """One window of every series, its place a function of (seed, epoch, series).

    Asked for by (epoch, position). The first forecast row lies within the last `reach` rows, and
    all T forecast rows are there; pasts are filled up like those of `LastWindows`.
    """

    def __init__(
        self, series: Sequence[Values], look_back: int, horizon: int, reach: int, seed: int
    ) -> None:
        self.series = series
        self.look_back = look_back
        self.horizon = horizon
        self.reach = reach
        self.seed = seed

    def __len__(self) -> int:
        return len(self.series)

    def __getitem__(self, key: tuple[int, int]) -> Window:
        epoch, position = key
        values = self.series[position]
        latest = len(values) - self.horizon
        earliest = min(max(1, len(values) - self.reach), latest)
        draws = np.random.default_rng((self.seed, epoch, position))
        cut = int(draws.integers(earliest, latest + 1))
        past = last(values[:cut], self.look_back)
        return _column(past), _column(values[cut : cut + self.horizon])


def last(past: Values, look_back: int) -> Values:
    """The last rows of a past, its first value repeated in front where it is shorter.

    >>> last(np.array([1.0, 2.0, 3.0]), 2).tolist(), last(np.array([1.0, 2.0]), 4).tolist()
    ([2.0, 3.0], [1.0, 1.0, 1.0, 2.0])
    """
    own = past[-look_back:]
    return np.concatenate([np.full(look_back - len(own), own[0]), own])


def _column(values: Values) -> torch.Tensor:
    return torch.from_numpy(values[:, None]).float()
