"""Windows cut into overlapping patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor

from ..core.errors import AdaptError
from ..core.recipe import require


@dataclass(frozen=True)
class Patches:
    """Patches of `length` P steps, one every `stride` S steps (GPT4TS, arXiv 2302.11939).

    The window is first lengthened by S copies of its last value, so a window of L steps has
    N = floor((L - P) / S) + 2 patches, and the last value is in one of them at any stride up to P.

    >>> Patches(16, 8).count(336), Patches(16, 16).count(512), Patches(24, 2).count(104)
    (42, 33, 42)
    """

    length: int = 16
    stride: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            require(whole, f"patches: {name}={value!r} is not allowed: a whole number from 1")
        require(
            self.stride <= self.length,
            f"patches: stride={self.stride} would leave out steps between patches of"
            f" {self.length}: at most {self.length}",
        )

    def count(self, look_back: int) -> int:
        """N of a window of `look_back` steps; refused when no patch fits."""
        if look_back < self.length:
            raise AdaptError(
                f"a window of {look_back} steps is shorter than a patch of {self.length}: lengthen"
                " look_back or shorten the patches"
            )
        return (look_back - self.length) // self.stride + 2

    def cut(self, z: Tensor) -> Tensor:
        """[b, L, c] -> [b, N, P c], the channels of a step side by side."""
        longer = F.pad(z.mT, (0, self.stride), mode="replicate")
        return longer.unfold(-1, self.length, self.stride).permute(0, 2, 3, 1).flatten(2)

    def to_json(self) -> dict[str, Any]:
        """What travels in the adapter file."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The settings that `to_json` wrote."""
        return cls(**data)
