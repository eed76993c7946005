"""A mask laid over its picture, as a PNG: what was found, or what was right, missed and false."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Mask = NDArray[np.uint8]

FOUND, MISSED, FALSE = (0, 200, 83), (41, 98, 255), (255, 61, 0)
_OPACITY = 0.6


def overlay(pixels: Pixels, mask: Mask, target: Mask | None = None) -> bytes:
    """A PNG of the picture [h, w, 3] with the mask [h, w] of 0 and 1 in green.

    With the true mask: green where both mark, blue what the mask misses, orange what is false.

    >>> black, mask = np.zeros((1, 3, 3), dtype=np.uint8), np.array([[1, 0, 1]], dtype=np.uint8)
    >>> shown = Image.open(io.BytesIO(overlay(black, mask, np.array([[1, 1, 0]], dtype=np.uint8))))
    >>> [shown.getpixel((x, 0)) for x in range(3)]
    [(0, 120, 50), (25, 59, 153), (153, 37, 0)]
    """
    found = mask != 0
    true = found if target is None else target != 0
    shown = pixels.astype(np.float32)
    for where, colour in ((found & true, FOUND), (true & ~found, MISSED), (found & ~true, FALSE)):
        shown[where] += _OPACITY * (np.array(colour, dtype=np.float32) - shown[where])
    file = io.BytesIO()
    Image.fromarray(shown.round().astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()
