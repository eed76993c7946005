"""Images that make one scene: joined by pairs that a network is sure of and that show parallax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import AdaptError
from .graph import spanning_tree
from .parallax import turned
from .predictions import Predictions
from .weights import Calibrated, in_space

LEAST_SHARE = 0.01  # of the second image's pixels. Our choice


def one_scene(
    predictions: Predictions, images: Tensor, names: Sequence[str], focals: Tensor | None = None
) -> Predictions:
    """The pairs without those from one place; see `require_connected` and `parallax.turned`.

    Raises AdaptError, one line with the names, for images that the rest does not join.
    """
    require_connected(predictions, names)
    moved = ~turned(predictions, images, focals)
    apart = _apart(predictions, moved, len(names))
    _require_none(
        apart,
        names,
        "and the others show no parallax: a turn of the camera explains what differs; depth needs"
        " cameras that stand apart",
        "no parallax against the rest, as the camera only turned: leave out, or add images from"
        " other places",
    )
    return predictions.only(moved)


def require_connected(predictions: Predictions, names: Sequence[str]) -> None:
    """Refuse images that no chain of pairs joins to the rest, each pair sure of what it says.

    A pair is sure if log C is at least 0.5 (the paper's gate: an error of 12 % is expected there)
    for 1 % of its second image, in either order. Photos of different places and images without
    texture are refused so, where an alignment would fit something to what is only guessed.

    Raises AdaptError, one line with the names.
    """
    apart = _apart(predictions, torch.ones(len(predictions.edges), dtype=torch.bool), len(names))
    _require_none(
        apart,
        names,
        "overlaps no other image as far as the network is sure, nor does any other of them: it"
        " needs texture, and cameras that stand apart and see the same things",
        "no overlap with the rest as far as the network is sure: leave out, or add images in"
        " between",
    )


def _require_none(apart: Sequence[int], names: Sequence[str], every: str, some: str) -> None:
    """Refuse views that are apart: every one, named by the first, or some, by their names."""
    if len(apart) == len(names):
        raise AdaptError(f"{names[0]} {every}")
    if apart:
        raise AdaptError(f"{_listed(names, apart)}: {some}")


def _apart(predictions: Predictions, counted: Tensor, views: int) -> list[int]:
    """The views that sure pairs, among those that count, do not join to the tree; maybe all."""
    sure = in_space(predictions.pair.confidence2, "log") >= Calibrated.gate
    share = sure.flatten(1).float().mean(1).where(counted.to(sure.device), 0.0)
    score = torch.full((views, views), -torch.inf)
    for (i, j), value in zip(predictions.edges.tolist(), share.tolist(), strict=True):
        if value >= LEAST_SHARE:
            score[i, j] = score[j, i] = max(value, float(score[i, j]))
    joined = {view for pair in spanning_tree(score) for view in pair}
    return [view for view in range(views) if view not in joined]


def _listed(names: Sequence[str], chosen: Sequence[int]) -> str:
    """At most three names, and how many there are besides."""
    many = f" and {len(chosen) - 3} more" if len(chosen) > 3 else ""
    return ", ".join(names[view] for view in chosen[:3]) + many
