"""Centre lines of masks: thinning to lines one pixel wide that hang together as the mask did."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint8]

# Row and column of the neighbours from north clockwise: bit i of a pixel's code is the i-th one's.
_AROUND = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))


def skeleton(mask: Mask) -> Mask:
    """uint8 [h, w] of 0 and 1: the mask thinned from all sides until nothing more can go.

    Guo and Hall's parallel thinning in two sub-iterations (Communications of the ACM 32, 1989): a
    pixel goes when its neighbours hang together without it and it ends no line. Parts that touch at
    a corner hang together; every part keeps at least one pixel.

    >>> bar = np.zeros((5, 9), dtype=np.uint8)
    >>> bar[1:4, 1:8] = 1
    >>> skeleton(bar)[2].tolist(), int(skeleton(bar).sum())
    ([0, 0, 1, 1, 1, 1, 1, 0, 0], 5)
    """
    left = np.pad(mask != 0, 1).astype(np.uint8)
    changed = True
    while changed:
        changed = False
        for goes in _GOES:
            codes = _codes(left)
            away = goes[codes] & (left[1:-1, 1:-1] == 1)
            left[1:-1, 1:-1][away] = 0
            changed = changed or bool(away.any())
    return left[1:-1, 1:-1].copy()


def _codes(padded: Mask) -> Mask:
    height, width = padded.shape[0] - 2, padded.shape[1] - 2
    codes = np.zeros((height, width), dtype=np.uint8)
    for bit, (down, across) in enumerate(_AROUND):
        codes |= padded[1 + down : 1 + down + height, 1 + across : 1 + across + width] << bit
    return codes


def _tables() -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For each of the two sub-iterations: does a pixel with this code of neighbours go?"""
    codes = np.arange(256)
    n, ne, e, se, s, sw, w, nw = ((codes >> bit) & 1 == 1 for bit in range(8))
    runs = (~n & (ne | e)) * 1 + (~e & (se | s)) + (~s & (sw | w)) + (~w & (nw | n))
    one = (nw | n) * 1 + (ne | e) + (se | s) + (sw | w)
    other = (n | ne) * 1 + (e | se) + (s | sw) + (w | nw)
    fewer = np.minimum(one, other)
    may_go = (runs == 1) & (fewer >= 2) & (fewer <= 3)
    return may_go & ~((n | ne | ~se) & e), may_go & ~((s | sw | ~nw) & w)


_GOES = _tables()
