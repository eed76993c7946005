"""Every window on its own scale: instance normalisation without learned numbers."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-5  # added to the variance: a constant window has std 0.0031623, not 0


def normalise(x: Tensor, observed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """z = (x - mean) / std of each window and channel; x, z [b, L, c]; mean, std [b, 1, c].

    std = sqrt(biased variance + 1e-5). Both are constants to backward. Where `observed` [b, L, c]
    is False, a value does not count and z is 0; a channel without any has mean 0.

    The mean is taken in two steps, for windows far from zero: a constant one gives z = 0.

    >>> z, mean, std = normalise(torch.tensor([1.0, 3.0]).view(1, 2, 1))
    >>> z.flatten(), mean.item(), round(std.item(), 4)
    (tensor([-1.0000,  1.0000]), 2.0, 1.0)
    """
    with torch.no_grad():
        weight = _weights(x, observed)
        first = _mean(x, weight)
        mean = first + _mean(x - first, weight)
        std = (_mean((x - mean).square(), weight) + EPSILON).sqrt()
    z = (x - mean) / std
    if observed is not None:
        z = torch.where(observed, z, 0)
    return z, mean, std


def _weights(x: Tensor, observed: Tensor | None) -> Tensor | None:
    """What each step counts: weights of a mean over time."""
    if observed is None:
        return None
    count = observed.sum(1, keepdim=True).clamp_min(1)
    return observed.to(x.dtype) / count


def _mean(x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return x.mean(1, keepdim=True)
    # Not x * weight: what is not observed may be NaN.
    return torch.where(weight > 0, x * weight, 0).sum(1, keepdim=True)
