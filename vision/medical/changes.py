"""How training varies a picture and its mask together: a pure function of (seed, epoch, index).

MONAI's transforms, with numbers that are drawn here.
"""

from __future__ import annotations

import math
import random
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Augmentation = Literal["none", "flip", "turns", "salt"]
Pixels = NDArray[np.uint8]
Mask = NDArray[np.uint8]
_BOTH = ("pixels", "mask")


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
    from monai.transforms.compose import Compose

    draw = random.Random(repr(key))  # hashed with SHA-512: neighbouring keys are unrelated
    seen = {"pixels": pixels.transpose(2, 0, 1).astype(np.float32), "mask": mask[None]}
    changed: dict[str, Any] = Compose(_drawn(how, draw))(seen)
    light, marked = (np.asarray(changed[name]) for name in _BOTH)
    light = np.clip(light, 0, 255).round().astype(np.uint8).transpose(1, 2, 0)
    return np.ascontiguousarray(light), np.ascontiguousarray(marked[0].astype(np.uint8))


def _drawn(how: Augmentation, draw: random.Random) -> list[Any]:
    """MONAI's transforms with the numbers that were drawn; its own draws hang on a shared state."""
    from monai.transforms.spatial.dictionary import Flipd, Rotate90d, Rotated

    changes: list[Any] = []
    if how == "turns":
        changes.append(Rotate90d(_BOTH, k=draw.randrange(4)))
        changes += _lit(draw.uniform(0.8, 1.25), draw.uniform(0.8, 1.25))
    if draw.random() < 0.5:
        changes.append(Flipd(_BOTH, spatial_axis=1))
    if how == "salt":
        if draw.random() < 0.5:
            angle = -math.radians(draw.uniform(1, 10))  # against the clock
            modes = ("bilinear", "nearest")
            changes.append(Rotated(_BOTH, angle, mode=modes, padding_mode="zeros"))
        if draw.random() < 0.5:
            changes += _lit(2 * max(0.5, draw.random()), 1.0)
    return changes


def _lit(brightness: float, contrast: float) -> list[Any]:
    """Contrast around the picture's mean, then brightness; MONAI's factors are what is added."""
    from monai.transforms.intensity.array import ScaleIntensityFixedMean
    from monai.transforms.intensity.dictionary import ScaleIntensityd
    from monai.transforms.utility.dictionary import Lambdad

    about = ScaleIntensityFixedMean(contrast - 1, preserve_range=False, fixed_mean=True)
    return [
        Lambdad("pixels", about),
        ScaleIntensityd("pixels", minv=None, maxv=None, factor=brightness - 1),
    ]


def random_crop(
    pixels: Pixels, mask: Mask, side: int, key: tuple[int, int, int]
) -> tuple[Pixels, Mask]:
    """A square of the picture and its mask at native resolution; a shorter side is kept whole."""
    draw = random.Random(repr(("crop", key)))
    top = draw.randint(0, max(mask.shape[0] - side, 0))
    left = draw.randint(0, max(mask.shape[1] - side, 0))
    there = slice(top, top + side), slice(left, left + side)
    return pixels[there], mask[there]
