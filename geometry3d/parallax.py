"""Whether two images tell depth at all: what is left of their motion when a turn is taken away.

Images taken from one place differ by a turn of the camera, whatever the scene is, and say nothing
of depth; a pointmap network answers all the same, most often with a camera that moved along a wall.
So the turn between two images is fitted to the images themselves, and the motion that it leaves is
measured in windows, by least squares on the images' gradients (Lucas and Kanade 1981). The network
only says where to begin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import AdaptError
from .cameras import rays
from .focal import focal_of
from .predictions import Predictions
from .rotations import rotation_of
from .similarity import turn_between

LEAST = 0.3  # pixels of an image that is at most LARGEST wide or high
ALIKE = 0.75  # correlation of the images' detail: below, the turn has not brought them together
SMALLEST, LARGEST = 64, 256  # pixels of the longer side: where the search begins, and ends
LONGEST = 0.05  # radians of a step: 3 pixels of an image of 64
_STEPS, _WINDOW, _AT_ONCE = 12, 13, 64


class Parallax(NamedTuple):
    """Of b pairs: the motion in pixels that no turn explains, and how alike the images then are."""

    left: Tensor  # [b]; the median over the windows, each as much as its texture tells
    alike: Tensor  # [b]; correlation, -1 to 1


def turned(predictions: Predictions, images: Tensor, focals: Tensor | None = None) -> Tensor:
    """Which pairs [m] a turn of the camera explains, for images [n, 3, h, w].

    In both orders if in one: less than 0.3 pixels of motion are left, in images of at most 256
    pixels, and the images' detail has a correlation above 0.75. Our choice: on generated scenes of
    64 pixels turns left up to 0.15, by night 0.11 to 0.32, and cameras that moved 0.5 and more.

    Images of less than 64 pixels are too small: a turn may fit them by chance, and none is told.

    `focals` [n], or None: as the first pointmaps say. If they are far off, a turn leaves motion
    that is taken for parallax. Raises AdaptError where a view's pointmaps tell no focal.
    """
    first, second = predictions.edges.T
    if max(images.shape[-2:]) < SMALLEST:
        return torch.zeros(len(first), dtype=torch.bool, device=first.device)
    if focals is None:
        focals = _focals(predictions, len(images))
    begin = _first_guess(predictions, focals)
    sides = torch.stack([focals[first], focals[second]])
    found = [
        parallax(images[first[some]], images[second[some]], begin[some], *sides[:, some])
        for some in torch.arange(len(first), device=first.device).split(_AT_ONCE)
    ]
    left, alike = (torch.cat(parts) for parts in zip(*found, strict=True))
    alone = (left < LEAST) & (alike > ALIKE)
    pairs = [tuple(sorted(edge)) for edge in predictions.edges.tolist()]
    either = {pair for pair, one in zip(pairs, alone.tolist(), strict=True) if one}
    return torch.tensor([pair in either for pair in pairs], device=alone.device)


def parallax(
    first: Tensor, second: Tensor, rotation: Tensor, focal1: Tensor, focal2: Tensor
) -> Parallax:
    """What the best turn leaves between images [b, 3, h, w] with focals [b].

    `rotation` [b, 3, 3], where the search begins, takes rays of the first camera to the second's;
    a few pixels of an image of 64 may be wrong with it.

    >>> image = torch.rand(1, 3, 48, 64)
    >>> eye, focal = torch.eye(3)[None], torch.tensor([64.0])
    >>> found = parallax(image, image, eye, focal, focal)
    >>> found.left.item() < 1e-3, round(found.alike.item(), 3)
    (True, 1.0)
    """
    for scale in _scales(*first.shape[-2:]):
        one, two = (_detail(F.avg_pool2d(image, scale)) for image in (first, second))
        f1, f2 = focal1 / scale, focal2 / scale
        motion = _motion(f1, *one.shape[-2:])
        for _ in range(_STEPS):
            there, seen = _turned(two, rotation, f1, f2)
            rotation = rotation @ rotation_of(_step(one, there, seen, motion))
    there, seen = _turned(two, rotation, f1, f2)
    return Parallax(_left(one, there, seen), _alike(one, there, seen))


def _scales(height: int, width: int) -> list[int]:
    """By how much the images are made smaller, the coarsest first."""
    whole = [s for s in (1, 2, 4, 8, 16, 32) if height % s == width % s == 0]
    wanted = [s for s in whole if SMALLEST <= max(height, width) / s <= LARGEST]
    return sorted(wanted or whole[:1], reverse=True)


def _focals(predictions: Predictions, views: int) -> Tensor:
    """What each view's pointmaps in its own frame say, as sure as they are."""
    first, pair = predictions.edges[:, 0], predictions.pair
    found = []
    for view in range(views):
        own = first == view
        try:
            found.append(focal_of(pair.points1[own], pair.confidence1[own] - 1))
        except AdaptError as error:
            raise AdaptError(f"view {view}: {error}") from None
    return torch.stack(found)


def _first_guess(predictions: Predictions, focals: Tensor) -> Tensor:
    """The turn that brings the second image's rays to where the network sees their points."""
    second = predictions.edges[:, 1]
    own = F.normalize(rays(focals[second], *predictions.size), dim=-1).flatten(1, 2)
    there = F.normalize(predictions.pair.points2, dim=-1).flatten(1, 2)
    sure = (predictions.pair.confidence2 - 1).clamp_min(1e-6).flatten(1)[..., None]
    known = there.isfinite().all(-1, keepdim=True) & sure.isfinite()
    return turn_between(torch.where(known, sure * own, 0).mT @ torch.where(known, there, 0))[0]


def _detail(images: Tensor, reach: int = 3) -> Tensor:
    """Grey images without their slow changes, of one contrast everywhere: [b, 1, h, w]."""
    grey = images.mean(1, keepdim=True)
    mean = _mean(grey, reach)
    spread = (_mean(grey.square(), reach) - mean.square()).clamp_min(0).sqrt()
    return _mean((grey - mean) / (spread + 0.02), 1)


def _mean(image: Tensor, reach: int) -> Tensor:
    """Over the square of 2 reach + 1 pixels around each."""
    wide = F.pad(image, (reach,) * 4, mode="replicate")
    return F.avg_pool2d(wide, 2 * reach + 1, 1)


def _motion(focals: Tensor, height: int, width: int) -> Tensor:
    """How fast pixels move as the camera turns: [b, h, w, 2, 3], pixels a radian of each axis."""
    x, y, one = rays(focals, height, width).unbind(-1)
    rows = [[-x * y, one + x * x, -y], [-one - y * y, x * y, x]]
    field = torch.stack([torch.stack(row, -1) for row in rows], -2)
    return focals[:, None, None, None, None] * field


def _turned(image: Tensor, rotation: Tensor, f1: Tensor, f2: Tensor) -> tuple[Tensor, Tensor]:
    """The second image as the first camera would see it, had it only turned; and where it does."""
    height, width = image.shape[-2:]
    ahead = rays(f1, height, width) @ rotation[:, None].mT
    size = image.new_tensor([width / 2, height / 2])
    at = f2[:, None, None, None] * ahead[..., :2] / ahead[..., 2:].clamp_min(1e-3) / size
    seen = (ahead[..., 2] > 1e-3) & (at.abs() < 1 - 1 / size).all(-1)
    there = F.grid_sample(image, at, align_corners=False, padding_mode="border")
    return there, seen[:, None].to(image.dtype)


def _slopes(image: Tensor) -> tuple[Tensor, Tensor]:
    wide = F.pad(image, (1, 1, 1, 1), mode="replicate")
    return (
        (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2,
        (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2,
    )


def _step(one: Tensor, there: Tensor, seen: Tensor, motion: Tensor) -> Tensor:
    """The turn [b, 3] that brings the images closer; what agrees badly counts less."""
    wrong = there - one
    slopes = torch.stack(_slopes(there), -1)[:, 0]
    change = (slopes[..., None, :] @ motion)[..., 0, :].flatten(1, 2)
    weight = (seen / (1 + (2 * wrong).square()).square()).flatten(1)[..., None]
    pulls = (weight * change).mT
    square = pulls @ change
    ridge = 1e-6 * (1 + square.diagonal(dim1=-2, dim2=-1).sum(-1))  # for images without texture
    square = square + torch.diag_embed(ridge[:, None].expand(-1, 3))
    step: Tensor = -torch.linalg.solve(square, pulls @ wrong.flatten(1)[..., None])[..., 0]
    length: Tensor = step.norm(dim=-1, keepdim=True)
    return step * length.clamp_max(LONGEST) / length.clamp_min(1e-9)


def _left(one: Tensor, there: Tensor, seen: Tensor) -> Tensor:
    """The median length of the motion in windows, weighed by what their texture tells of it."""
    (across, down), wrong = _slopes((one + there) / 2), there - one
    names = across * across, across * down, down * down, across * wrong, down * wrong
    xx, xy, yy, xt, yt = (_mean(seen * product, _WINDOW // 2) for product in names)
    det = xx * yy - xy.square()
    least = (xx + yy) / 2 - (((xx - yy) / 2).square() + xy.square()).sqrt()  # eigenvalue
    moved = torch.hypot(xy * yt - yy * xt, xy * xt - xx * yt) / det.clamp_min(1e-9)
    return torch.stack([_median(*two) for two in zip(moved, least.clamp_min(0), strict=True)])


def _median(values: Tensor, weights: Tensor) -> Tensor:
    """The value that half of the weight lies below; NaN where there is no weight."""
    ordered, order = values.flatten().sort()
    below = weights.flatten()[order].cumsum(0)
    if not below[-1] > 0:
        return ordered.new_tensor(torch.nan)
    return ordered[(below < below[-1] / 2).sum()]


def _alike(one: Tensor, there: Tensor, seen: Tensor) -> Tensor:
    both, own, other = ((seen * p).flatten(1).sum(1) for p in (one * there, one**2, there**2))
    return both / (own * other).sqrt()
