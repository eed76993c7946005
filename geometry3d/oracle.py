"""A network that knows the scene and errs as told: noise, outliers, false confidence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import AdaptError
from .cameras import camera_points, inverse_poses, moved
from .pointmaps import Pair, PointmapNetwork
from .predictions import Predictions
from .reconstruction import Reconstruction


@dataclass(frozen=True)
class Flaws:
    """How an `Oracle` errs. Lengths are shares of a point's depth in its own camera.

    noise:          smooth, independent from pair to pair, root mean square
    common:         smooth, the same for a view with every partner: what no alignment can remove
    outliers:       share of the pixels, in patches, that a pair puts half their depth away
    outlier_views:  the views that have them (None: all)
    confidence:     of a point without error: C = 1 + (confidence - 1) / (1 + (error / 0.05)^2)
    outlier_confidence: of every outlier
    miscalibration: 0: confidence falls with the error; 1: it says nothing of it (smooth chance)
    scales:         spread of the logarithm of the pairs' scales: every pair has its own unit
    patch:          size of noise and patches in pixels
    """

    noise: float = 0.0
    common: float = 0.0
    outliers: float = 0.0
    outlier_views: tuple[int, ...] | None = None
    confidence: float = 11.0
    outlier_confidence: float = 11.0
    miscalibration: float = 0.0
    scales: float = 0.2
    patch: float = 6.0


ERROR = 0.05  # of the depth: at this error the confidence above 1 has halved
OUTLIER = 0.5  # of the depth


class Oracle(PointmapNetwork):
    """Answers with the truth of a scene, spoilt by `Flaws`; a function of scene, flaws and seed.

    `forward` finds the views by their images, bit for bit; `pair` takes their numbers. The same
    pair always gets the same answer, in whatever order it is asked. The views' measured depths
    become points; where the truth has no depth the answer is NaN.
    """

    def __init__(self, scene: Reconstruction, flaws: Flaws | None = None, seed: int = 0) -> None:
        super().__init__()
        self.scene, self.flaws, self.seed = scene, flaws or Flaws(), seed

    def forward(self, first: Tensor, second: Tensor) -> Pair:
        """Images of the scene [b, 3, h, w] -> their spoilt pointmaps."""
        answers = [
            self.pair(self._view(a), self._view(b)) for a, b in zip(first, second, strict=True)
        ]
        return Pair(*(torch.stack(part) for part in zip(*answers, strict=True)))

    def predictions(self, edges: Tensor) -> Predictions:
        """The answers to all pairs of view numbers [m, 2]."""
        answers = [self.pair(i, j) for i, j in edges.tolist()]
        return Predictions(edges, Pair(*(torch.stack(p) for p in zip(*answers, strict=True))))

    def pair(self, i: int, j: int) -> Pair:
        """The answer to views i and j, without a batch dimension; both maps in i's frame."""
        chance = self._chance(i, j)
        unit = (torch.randn((), generator=chance) * self.flaws.scales).exp()
        points1, confidence1 = self._spoilt(i, chance)
        points2, confidence2 = self._spoilt(j, chance)
        across = inverse_poses(self.scene.poses[i]) @ self.scene.poses[j]
        return Pair(unit * points1, confidence1, unit * moved(points2, across), confidence2)

    def _spoilt(self, view: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
        """One view's points in its own frame [h, w, 3], and their confidence [h, w]."""
        flaws, depth = self.flaws, self.scene.depths[view]
        depth = torch.where(depth > 0, depth, torch.nan)
        error = flaws.noise * self._smooth(chance) + flaws.common * self._smooth(
            self._chance(view, view)
        )
        wrong = self._smooth(chance)[..., 0]
        outlying = flaws.outlier_views is None or view in flaws.outlier_views
        share = flaws.outliers if outlying else 0.0
        wrong = wrong > wrong.quantile(1 - share) if share else torch.zeros_like(wrong).bool()
        away = OUTLIER * F.normalize(self._smooth(chance), dim=-1)
        calibrated = 1 / (1 + (error.norm(dim=-1) / ERROR).square())
        chosen = torch.special.ndtr(self._smooth(chance)[..., 0] * 3**0.5)
        sure = (flaws.confidence - 1) * calibrated.lerp(chosen, flaws.miscalibration)
        error = torch.where(wrong[..., None], error + away, error)
        points = camera_points(depth, self.scene.focals[view]) + depth[..., None] * error
        return points, torch.where(wrong, flaws.outlier_confidence, 1 + sure)

    def _smooth(self, chance: torch.Generator) -> Tensor:
        """A smooth random field [h, w, 3] whose vectors have the root mean square length 1."""
        height, width = self.scene.depths.shape[1:]
        cells = [max(2, round(side / self.flaws.patch) + 1) for side in (height, width)]
        coarse = torch.randn(1, 3, *cells, generator=chance)
        field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0]
        field = field / field.square().sum(0).mean().sqrt()
        return field.movedim(0, -1).to(self.scene.depths)

    def _chance(self, i: int, j: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 10_007 + i) * 10_007 + j)

    def _view(self, image: Tensor) -> int:
        for number, own in enumerate(self.scene.images):
            if torch.equal(own, image):
                return number
        raise AdaptError("the oracle is asked about an image that is not of its scene")
