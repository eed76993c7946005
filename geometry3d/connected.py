"""Images that a network is sure belong to one scene, and those that it knows nothing of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.errors import AdaptError
from .graph import spanning_tree
from .predictions import Predictions
from .weights import Calibrated, in_space

LEAST_SHARE = 0.01  # of the second image's pixels. Our choice


def require_connected(predictions: Predictions, names: Sequence[str]) -> None:
    """Refuse images that no chain of pairs joins to the rest, each pair sure of what it says.

    A pair is sure if log C is at least 0.5 (the paper's gate: an error of 12 % is expected there)
    for 1 % of its second image, in either order. Photos of different places and images without
    texture are refused so, where an alignment would fit something to what is only guessed. A
    camera that only turns is not always: that looks like one that moves along a flat wall.

    Raises AdaptError, one line with the names.
    """
    sure = in_space(predictions.pair.confidence2, "log") >= Calibrated.gate
    share = sure.flatten(1).float().mean(1).cpu()
    score = torch.full((len(names), len(names)), -torch.inf)
    for (i, j), value in zip(predictions.edges.tolist(), share.tolist(), strict=True):
        if value >= LEAST_SHARE:
            score[i, j] = score[j, i] = max(value, float(score[i, j]))
    joined = {view for pair in spanning_tree(score) for view in pair}
    apart = [name for view, name in enumerate(names) if view not in joined]
    if not joined:
        raise AdaptError(
            f"{names[0]} overlaps no other image as far as the network is sure, nor does any other"
            " of them: it needs texture, and cameras that stand apart and see the same things"
        )
    if apart:
        many = f" and {len(apart) - 3} more" if len(apart) > 3 else ""
        raise AdaptError(
            f"{', '.join(apart[:3])}{many}: overlaps no other image as far as the network is sure:"
            " leave it out, or add images in between"
        )
