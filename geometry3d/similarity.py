"""Similarities x -> s R x + t, and the one that brings points onto others (Umeyama)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import AdaptError

# Points count as lying on a line where their second spread is below this share of the first: the
# turn about the line is then noise.
COLLINEAR = 1e-5


@dataclass(frozen=True)
class Similarity:
    """x -> scale * rotation @ x + translation; the fields may carry leading batch dimensions."""

    scale: Tensor  # [...]
    rotation: Tensor  # [..., 3, 3]
    translation: Tensor  # [..., 3]

    def apply(self, points: Tensor) -> Tensor:
        """Points [..., p, 3], where [...] are this similarity's batch dimensions."""
        turned = points @ self.rotation.mT
        return self.scale[..., None, None] * turned + self.translation[..., None, :]

    def inverse(self) -> Similarity:
        """The way back."""
        back, scale = self.rotation.mT, 1 / self.scale
        moved = (back @ self.translation[..., None])[..., 0]
        return Similarity(scale, back, -scale[..., None] * moved)

    def __getitem__(self, index: int | slice | Tensor) -> Similarity:
        """Of a batch, the ones asked for."""
        return Similarity(self.scale[index], self.rotation[index], self.translation[index])

    def __setitem__(self, index: int | slice | Tensor, other: Similarity) -> None:
        """Replace some of a batch, in place."""
        self.scale[index] = other.scale
        self.rotation[index] = other.rotation
        self.translation[index] = other.translation


@dataclass(frozen=True)
class Moments:
    """Weighted sums over points x and their partners y: all that a fit needs. Sums add up."""

    weight: Tensor  # [...] sum of w
    source: Tensor  # [..., 3] sum of w x
    target: Tensor  # [..., 3] sum of w y
    product: Tensor  # [..., 3, 3] sum of w y x^T
    square: Tensor  # [...] sum of w |x|^2

    @classmethod
    def of(cls, source: Tensor, target: Tensor, weights: Tensor) -> Moments:
        """Points [..., p, 3] and weights [..., p], summed over p."""
        weighted = weights[..., None] * source
        return cls(
            weights.sum(-1),
            weighted.sum(-2),
            (weights[..., None] * target).sum(-2),
            target.mT @ weighted,
            (weighted * source).sum((-2, -1)),
        )

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(a + b for a, b in zip(self.sums(), other.sums(), strict=True)))

    def __getitem__(self, index: Tensor) -> Moments:
        """Of a batch, the ones asked for."""
        return Moments(*(value[index] for value in self.sums()))

    def sums(self) -> tuple[Tensor, ...]:
        """The five sums."""
        return self.weight, self.source, self.target, self.product, self.square

    @classmethod
    def joined(cls, parts: Sequence[Moments]) -> Moments:
        """Several batches as one."""
        return cls(*map(torch.cat, zip(*(part.sums() for part in parts), strict=True)))

    def similarity(self, scaled: bool = True, pull: Tensor | float = 0.0) -> Similarity:
        """The similarity with the least weighted sum of squares |y - (s R x + t)|^2.

        `pull` adds -2 pull log(s) to that sum: the force with which a constraint on the product of
        several scales holds each of them up. The rotation's determinant is +1.
        """
        total = self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny)
        x, y = self.source / total[..., None], self.target / total[..., None]
        between = self.product - total[..., None, None] * y[..., :, None] * x[..., None, :]
        rotation, along = turn_between(between)
        spread = self.square - total * x.square().sum(-1)
        scale = (along + (along.square() + 4 * pull * spread).sqrt()) / (2 * spread)
        if not scaled:
            scale = torch.ones_like(scale)
        moved = (rotation @ x[..., None])[..., 0]
        return Similarity(scale, rotation, y - scale[..., None] * moved)


def turn_between(between: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation R with the largest trace(R^T M), and that trace."""
    U, S, Vh = torch.linalg.svd(between.double())
    sign = torch.ones_like(S)
    sign[..., 2] = torch.linalg.det(U @ Vh).sign()
    rotation = (U * sign[..., None, :]) @ Vh
    return rotation.to(between.dtype), (S * sign).sum(-1).to(between.dtype)


def fit_similarity(
    source: Tensor, target: Tensor, weights: Tensor | None = None, scaled: bool = True
) -> Similarity:
    """The similarity that brings `source` onto `target` best: the least weighted sum of squares.

    Points [p, 3], weights [p] of at least 0 (None: all alike), from Umeyama 1991: with the centred
    covariance Y X^T = U D V^T, R = U S V^T where S = diag(1, 1, +-1) makes det R = +1,
    s = trace(D S) / |X|^2, t = mean y - s R mean x. With scaled=False the scale is 1.

    Raises AdaptError where fewer than three points count or they lie on one line: the turn about
    that line is then undetermined.

    >>> corners = torch.eye(3)
    >>> moved = fit_similarity(corners, 2 * corners + 1)
    >>> round(moved.scale.item(), 4), [round(x, 4) for x in moved.translation.tolist()]
    (2.0, [1.0, 1.0, 1.0])
    """
    if weights is None:
        weights = torch.ones_like(source[..., 0])
    _require_a_plane(source, weights, "source")
    _require_a_plane(target, weights, "target")
    return _centred_fit(source, target, weights, scaled)


def fit_robustly(source: Tensor, target: Tensor, weights: Tensor, steps: int = 20) -> Similarity:
    """As `fit_similarity`, for the least weighted sum of distances: outliers pull little.

    By reweighting with 1 / distance; distances below 1e-6 of the target's extent count as that.
    """
    found = fit_similarity(source, target, weights)
    least = 1e-6 * (target - target.mean(0)).norm(dim=-1).mean()
    for _ in range(steps):
        distance = (target - found.apply(source)).norm(dim=-1).clamp_min(least)
        found = _centred_fit(source, target, weights / distance, scaled=True)
    return found


def _centred_fit(source: Tensor, target: Tensor, weights: Tensor, scaled: bool) -> Similarity:
    """The sums are taken about the centres: about a far origin they would lose their digits."""
    share = (weights / weights.sum(-1, keepdim=True))[..., None]
    x, y = (share * source).sum(-2), (share * target).sum(-2)
    moments = Moments.of(source - x[..., None, :], target - y[..., None, :], share[..., 0])
    found = moments.similarity(scaled)
    moved = (found.rotation @ x[..., None])[..., 0]
    return Similarity(
        found.scale, found.rotation, found.translation + y - found.scale[..., None] * moved
    )


def _require_a_plane(points: Tensor, weights: Tensor, name: str) -> None:
    counted = points[weights > 0]
    if len(counted) < 3:
        raise AdaptError(f"the {name} has {len(counted)} points that count: a fit needs three")
    spreads = torch.linalg.svdvals((counted - counted.mean(0)).double())
    if not spreads[1] > COLLINEAR * spreads[0]:
        raise AdaptError(f"the {name} points lie on one line: the turn about it is undetermined")
