"""Random numbers of one scene: a pure function of the words that name it."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..rotations import rotation_of


class Draw:
    """Random numbers that depend on `key` alone, the same in every process.

    >>> Draw("room", 7).whole(1, 6) == Draw("room", 7).whole(1, 6)
    True
    """

    def __init__(self, *key: str | int) -> None:
        digest = hashlib.sha256(repr(key).encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """fp32 numbers from low to high."""
        return low + (high - low) * torch.rand(*shape, generator=self._generator)

    def number(self, low: float, high: float) -> float:
        """One number from low to high."""
        return float(self.uniform(low, high, 1))

    def normal(self, *shape: int) -> Tensor:
        """fp32 numbers of mean 0 and standard deviation 1."""
        return torch.randn(*shape, generator=self._generator)

    def whole(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return int(torch.randint(low, high + 1, (1,), generator=self._generator))

    def turns(self, most: float, *shape: int) -> Tensor:
        """Rotations [*shape, 3, 3] by at most so many degrees about random axes."""
        axes = F.normalize(self.normal(*shape, 3), dim=-1)
        return rotation_of(axes * self.uniform(-math.radians(most), math.radians(most), *shape, 1))
