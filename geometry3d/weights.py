"""How much each predicted point counts: fixed by the network, or calibrated by the other views."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import AdaptError

Space = Literal["log", "raw"]


def in_space(confidence: Tensor, space: Space) -> Tensor:
    """log C, the weight of DUSt3R's own alignment, or C itself; 0 where C is not finite."""
    if space not in ("log", "raw"):
        raise AdaptError(f"confidence space {space!r} is not known: log or raw")
    if space == "log":
        confidence = confidence.clamp_min(1).log()
    return torch.where(confidence.isfinite(), confidence, 0.0).clamp_min(0)


def calibrated(initial: Tensor, residual: Tensor, mu: float) -> Tensor:
    """w = C / (1 + e / mu)^2, elementwise: C the initial weight, e >= 0 the residual's length.

    The w >= 0 that minimises w e + mu (sqrt w - sqrt C)^2 (LoRA3D, arXiv 2412.07746).

    >>> calibrated(torch.tensor(4.0), torch.tensor([0.0, 0.1, 0.3]), mu=0.1).tolist()
    [4.0, 1.0, 0.25]
    """
    return initial / (1 + residual / mu).square()


def reduced_cost(initial: Tensor, residual: Tensor, mu: float) -> Tensor:
    """C mu e / (mu + e): what is left of the cost once w is eliminated; at most C mu."""
    return initial * mu * residual / (mu + residual)


@dataclass(frozen=True)
class Calibrated:
    """Weights that fall with the residual: w = C / (1 + e / mu)^2 (LoRA3D, arXiv 2412.07746).

    `space` says what C is: log of the network's confidence (DUSt3R's aligner weighs so) or the
    confidence itself. Initial weights below `gate` count as 0 throughout; a raw confidence is
    above 1, so that in raw space the paper's 0.5 removes nothing. `mu` is in the alignment's unit
    (the geometric mean of the pairs' scales is 0.5); None takes the median residual at the first
    refresh, our choice: the paper's value is not known to us.
    """

    space: Space = "log"
    mu: float | None = None
    gate: float = 0.5

    def __post_init__(self) -> None:
        if self.mu is not None and not 0 < self.mu < math.inf:
            raise AdaptError(f"mu = {self.mu} is not allowed: a length above 0")
        if not math.isfinite(self.gate):
            raise AdaptError(f"gate = {self.gate} is not allowed: a weight, such as 0.5")

    def initial(self, confidence: Tensor) -> Tensor:
        """The weights before any residual is known."""
        weights = in_space(confidence, self.space)
        return torch.where(weights < self.gate, 0.0, weights)

    def refreshed(self, initial: Tensor, residual: Tensor, mu: float) -> Tensor:
        """The weights at these residuals."""
        return calibrated(initial, residual, mu)


@dataclass(frozen=True)
class Fixed:
    """Weights that stay what the network said: DUSt3R's plain alignment, the baseline."""

    space: Space = "log"

    def initial(self, confidence: Tensor) -> Tensor:
        """log C, or C in raw space."""
        return in_space(confidence, self.space)

    def refreshed(self, initial: Tensor, residual: Tensor, mu: float) -> Tensor:
        """The same weights again."""
        return initial
