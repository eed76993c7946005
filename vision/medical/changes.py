"""How training varies a picture and its mask together: a pure function of (seed, epoch, index)."""

from __future__ import annotations

import random
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...core.errors import AdaptError

Augmentation = Literal["none", "flip", "turns", "salt"]
Pixels = NDArray[np.uint8]
Mask = NDArray[np.uint8]


def varied(
    pixels: Pixels, mask: Mask, how: Augmentation, key: tuple[int, int, int]
) -> tuple[Pixels, Mask]:
    """One training view of a picture [h, w, 3] and its mask [h, w].

    ========  =====================================================================================
    `none`    as they are
    `flip`    half of them left to right
    `turns`   one of the eight symmetries of a square, brightness and contrast times 0.8 to 1.25:
              for pictures without an upper side
    `salt`    as SALT's released code: half left to right; half turned by 1 to 10 degrees; half
              brighter, by 2 max(0.5, u), u uniform, cut off at 255
    ========  =====================================================================================

    >>> pixels, mask = np.arange(12, dtype=np.uint8).reshape(2, 2, 3), np.eye(2, dtype=np.uint8)
    >>> seen = [varied(pixels, mask, "turns", (0, epoch, 3))[0].tolist() for epoch in (1, 1, 2)]
    >>> seen[0] == seen[1], seen[0] == seen[2]
    (True, False)
    """
    if how == "none":
        return pixels, mask
    draw = random.Random(repr(key))  # hashed with SHA-512: neighbouring keys are unrelated
    if how == "turns":
        pixels, mask = _turned(pixels, mask, draw.randrange(4))
        pixels = _lit(pixels, draw.uniform(0.8, 1.25), draw.uniform(0.8, 1.25))
    if draw.random() < 0.5:
        pixels, mask = pixels[:, ::-1], mask[:, ::-1]
    if how == "salt":
        if draw.random() < 0.5:
            pixels, mask = _tilted(pixels, mask, draw.uniform(1, 10))
        if draw.random() < 0.5:
            pixels = _lit(pixels, 2 * max(0.5, draw.random()), 1.0)
    return np.ascontiguousarray(pixels), np.ascontiguousarray(mask)


def random_crop(
    pixels: Pixels, mask: Mask, side: int, key: tuple[int, int, int]
) -> tuple[Pixels, Mask]:
    """A square of the picture and its mask at native resolution; a shorter side is kept whole."""
    draw = random.Random(repr(("crop", key)))
    top = draw.randint(0, max(mask.shape[0] - side, 0))
    left = draw.randint(0, max(mask.shape[1] - side, 0))
    there = slice(top, top + side), slice(left, left + side)
    return pixels[there], mask[there]


def require_known(how: str) -> None:
    """Refuse an augmentation that `varied` does not have."""
    from typing import get_args

    if how not in get_args(Augmentation):
        allowed = ", ".join(get_args(Augmentation))
        raise AdaptError(f"augmentation={how!r} is not allowed: {allowed}")


def _turned(pixels: Pixels, mask: Mask, quarters: int) -> tuple[Pixels, Mask]:
    return np.rot90(pixels, quarters), np.rot90(mask, quarters)


def _tilted(pixels: Pixels, mask: Mask, degrees: float) -> tuple[Pixels, Mask]:
    """Turned around the middle within the same frame; what comes from outside is zero."""
    sampling: Any = (Image.Resampling.BILINEAR, Image.Resampling.NEAREST)
    seen, marked = (
        np.array(Image.fromarray(np.ascontiguousarray(array)).rotate(degrees, how))
        for array, how in zip((pixels, mask), sampling, strict=True)
    )
    return seen, marked


def _lit(pixels: Pixels, brightness: float, contrast: float) -> Pixels:
    """Contrast around the picture's mean, then brightness."""
    mean = pixels.mean()
    lit: NDArray[np.float64] = ((pixels - mean) * contrast + mean) * brightness
    return np.clip(lit, 0, 255).round().astype(np.uint8)
