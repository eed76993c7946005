"""How well a mask fits: Dice, IoU, centre-line Dice and the Hausdorff distance, empty masks too."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ...core.errors import AdaptError
from .skeleton import skeleton
from .view import View

Mask = NDArray[np.uint8]
Spacing = tuple[float, float]


@dataclass(frozen=True)
class MaskScores:
    """The scores of one picture, NaN where not measured.

    `empty` is how many of its two masks mark nothing: 0, 1 or 2.
    """

    dice: float
    iou: float
    cldice: float
    hd95: float
    empty: int = 0


def score(
    prediction: Mask, target: Mask, spacing: Spacing | None = None, *, overlap_only: bool = False
) -> MaskScores:
    """Scores of a predicted mask [h, w] of 0 and 1 against the true one, at the picture's own size.

    With P and T the marked pixels and S their centre lines (`skeleton`):

    ========  ====================================================================================
    `dice`    2 |P and T| / (|P| + |T|), without smoothing
    `iou`     |P and T| / |P or T|
    `cldice`  harmonic mean of |S_P and T| / |S_P| and |S_T and P| / |S_T| (arXiv 2003.07311)
    `hd95`    the larger of the 95th percentiles of the distances from the border of P to that of T
              and back, in pixels or, with `spacing` (down, across), in mm; MONAI measures it
    ========  ====================================================================================

    The empty-mask rule: both empty is a right answer (1, 1, 1 and a distance of 0); one empty is
    wholly wrong (0, 0, 0 and the picture's diagonal), so that a model that predicts nothing cannot
    better its mean, as it does where such pictures are left out.

    The last two take about a second for a million pixels: `overlap_only` does not measure them.

    >>> square, shifted = np.zeros((2, 8, 8), dtype=np.uint8)
    >>> square[2:6, 2:6] = shifted[2:6, 3:7] = 1
    >>> score(shifted, square)
    MaskScores(dice=0.75, iou=0.6, cldice=1.0, hd95=1.0, empty=0)
    """
    if prediction.shape != target.shape:
        raise AdaptError(
            f"a mask of {list(prediction.shape)} cannot be scored against one of"
            f" {list(target.shape)}: bring it to the picture's own size first"
        )
    p, t = prediction != 0, target != 0
    empty = int(not p.any()) + int(not t.any())
    if empty:
        right = float(empty == 2)
        lines = math.nan if overlap_only else right
        distance = math.nan if overlap_only else (1 - right) * _diagonal(target, spacing)
        return MaskScores(right, right, lines, distance, empty)
    both = int((p & t).sum())
    dice = 2 * both / int(p.sum() + t.sum())
    iou = both / int((p | t).sum())
    if overlap_only:
        return MaskScores(dice, iou, math.nan, math.nan)
    return MaskScores(dice, iou, _cldice(p, t), _hd95(p, t, spacing))


def _diagonal(mask: Mask, spacing: Spacing | None) -> float:
    down, across = spacing or (1.0, 1.0)
    return math.hypot(mask.shape[0] * down, mask.shape[1] * across)


def _cldice(p: NDArray[np.bool_], t: NDArray[np.bool_]) -> float:
    line_p, line_t = (skeleton(mask.astype(np.uint8)) == 1 for mask in (p, t))
    precision, sensitivity = float(t[line_p].mean()), float(p[line_t].mean())
    total = precision + sensitivity
    return 2 * precision * sensitivity / total if total else 0.0


def _hd95(p: NDArray[np.bool_], t: NDArray[np.bool_], spacing: Spacing | None) -> float:
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    predicted, true = (torch.from_numpy(mask)[None, None].float() for mask in (p, t))
    with warnings.catch_warnings():
        # MONAI 1.6 warns of an argument that it passes itself.
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
        distance = compute_hausdorff_distance(
            predicted, true, include_background=True, percentile=95, spacing=list(spacing or (1, 1))
        )
    return float(distance)


def means(scores: Sequence[MaskScores]) -> dict[str, float]:
    """Means over pictures of what was measured, their number, how many have one or two empty masks.

    >>> few = means([MaskScores(0.5, 0.25, 0.5, 4.0), MaskScores(1.0, 1.0, 1.0, 0.0, empty=2)])
    >>> few["dice"], few["hd95"], few["one_empty"], few["both_empty"]
    (0.75, 2.0, 0, 1)
    """
    if not scores:
        raise AdaptError("there is no picture to take the mean of")
    found = {
        name: float(np.mean([getattr(s, name) for s in scores]))
        for name in ("dice", "iou", "cldice", "hd95")
    }
    return {name: mean for name, mean in found.items() if not math.isnan(mean)} | {
        "pictures": len(scores),
        "one_empty": sum(s.empty == 1 for s in scores),
        "both_empty": sum(s.empty == 2 for s in scores),
    }


def ceiling(target: Mask, view: View, whole: bool = False) -> MaskScores:
    """What a perfect answer in the view's square scores once it is back at the picture's own size.

    The answer is the share of each pixel that is marked, or with `whole` only whether that is at
    least half. Thin structures are lost on the way, whatever the model: state it beside its scores.

    >>> line = np.zeros((8, 8), dtype=np.uint8)
    >>> line[3] = 1
    >>> ceiling(line, View.sam(8)).dice, ceiling(line, View.sam(2)).dice
    (1.0, 0.0)
    """
    seen = view.mask(target) if whole else view.shares(target)
    native = view.native(seen - 0.5, (target.shape[0], target.shape[1]))
    return score((native[0] > 0).numpy().astype(np.uint8), target)
