"""How well a cloud of points fits the true surface: accuracy, completeness, Chamfer distance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.errors import AdaptError


@dataclass(frozen=True)
class SurfaceError:
    """Distances in units of the truth: means, with medians beside them."""

    accuracy: float
    completeness: float
    accuracy_median: float
    completeness_median: float

    @property
    def chamfer(self) -> float:
        """The mean (not the sum) of accuracy and completeness."""
        return (self.accuracy + self.completeness) / 2


def surface_error(points: Tensor, truth: Tensor, most: int = 200_000) -> SurfaceError:
    """Clouds [p, 3] and [q, 3], already in one frame.

    Accuracy: the mean distance of an estimated point to the nearest true one; completeness: of a
    true point to the nearest estimated one. Density matters: a cloud of more than `most` points is
    thinned to that, evenly by its order, and so are both clouds of a fair comparison.

    Raises AdaptError for a cloud that is empty or not finite.

    >>> square = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    >>> found = surface_error(square[:2], square)
    >>> found.accuracy, found.completeness, found.chamfer
    (0.0, 0.5, 0.25)
    """
    from scipy.spatial import cKDTree

    a, b = _checked(points, "estimated", most), _checked(truth, "true", most)
    there, back = cKDTree(b).query(a)[0], cKDTree(a).query(b)[0]
    return SurfaceError(
        float(there.mean()), float(back.mean()), float(np.median(there)), float(np.median(back))
    )


def _checked(
    points: Tensor, name: str, most: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
        raise AdaptError(f"the {name} points are {list(points.shape)}: [p, 3] is wanted, p above 0")
    if not points.isfinite().all():
        raise AdaptError(f"{name} points that are not finite have no distance")
    if len(points) > most:
        points = points[torch.linspace(0, len(points) - 1, most).round().long()]
    array: np.ndarray[tuple[int, int], np.dtype[np.float64]] = (
        points.detach().cpu().double().numpy()
    )
    return array
