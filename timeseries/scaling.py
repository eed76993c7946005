"""One mean and standard deviation per channel, measured on training rows and kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import AdaptError
from .series import Values

_NO_SPREAD = np.finfo(np.float64).tiny ** 0.5  # its square is 0


@dataclass(frozen=True)
class Scaler:
    """z = (x - mean) / std for every channel; `std` is the population's (divided by n).

    >>> scaler = Scaler.of(np.array([[1.0, 5.0], [3.0, 5.0]]))
    >>> scaler
    Scaler(mean=(2.0, 5.0), std=(1.0, 1.0))
    >>> scaler.undo(scaler.apply(np.array([[4.0, 6.0]]))).tolist()
    [[4.0, 6.0]]
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, values: Values) -> Scaler:
        """Of values [rows, C]; a constant channel has std 1, so that it becomes 0 and no NaN."""
        if not len(values):
            raise AdaptError("no row to measure a mean and a standard deviation on")
        constant = values.max(axis=0) - values.min(axis=0) <= _NO_SPREAD
        # A sum of equal numbers rounds: their mean would be beside them, and std not quite 0.
        mean = np.where(constant, values[0], values.mean(axis=0))
        std = np.where(constant, 1.0, values.std(axis=0))
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def apply(self, values: Values) -> Values:
        """Values [..., C] in units of the standard deviation."""
        self._require(values)
        scaled: Values = (values - np.array(self.mean)) / np.array(self.std)
        return scaled

    def undo(self, values: Values) -> Values:
        """Scaled values [..., C] in their own units."""
        self._require(values)
        undone: Values = values * np.array(self.std) + np.array(self.mean)
        return undone

    def to_json(self) -> dict[str, list[float]]:
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Scaler:
        lists = [record.get(name) for name in ("mean", "std")]
        fine = all(isinstance(one, list) and all(map(_is_finite, one)) for one in lists)
        mean, std = (tuple(map(float, one)) if fine and one else () for one in lists)
        if len(mean) != len(std) or min(std, default=0) <= 0:
            raise AdaptError(f"not a scaler, two lists of as many numbers, std > 0: {record!r}")
        return cls(mean, std)

    def _require(self, values: Values) -> None:
        if values.shape[-1] != len(self.mean):
            raise AdaptError(f"{values.shape[-1]} channels: the scaler knows {len(self.mean)}")


def _is_finite(number: object) -> bool:
    return isinstance(number, int | float) and bool(np.isfinite(number))
