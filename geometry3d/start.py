"""Where an alignment starts: the pairs joined along a spanning tree of the surest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..core.errors import AdaptError
from .focal import focal_of
from .geometry import Geometry
from .graph import spanning_tree
from .observations import Observations
from .similarity import Similarity, fit_robustly

# A fit of eight numbers needs no more points than this; more are thinned out evenly.
ENOUGH_POINTS = 4096


def start(seen: Observations, size: tuple[int, int], focals: Tensor | None) -> Geometry:
    """Poses, depths, focals and the pairs' similarities, exact where the predictions are.

    The best pair gives the world; then the best pair between a placed view and a new one is fitted
    to the placed view's points and brings the new view's, until all are placed (DUSt3R, arXiv
    2312.14132; score of a pair: its first map's mean weight times its second's). A view's focal is
    `focal_of` its own maps; the similarity between its best own map and its world points gives
    its pose and its depth; further fits give each pair its similarity. All fits are robust.

    Raises AdaptError where the pairs that count leave views unconnected.
    """
    score = seen.by_edge(seen.initial.mean(1)).prod(1)
    own = _own_maps(seen, score)
    if focals is None:
        focals = torch.stack([_focal(seen, view, size) for view in range(seen.views)])
    world = _placed(seen, score)
    cameras, depths = [], []
    for view, k in enumerate(own):
        with _about(f"view {view}"):
            cameras.append(_fit(seen.points[k], world[view], seen.initial[k]))
            depths.append(_depth(seen.points[k, :, 2] * cameras[view].scale))
    geometry = Geometry(
        rotations=torch.stack([camera.rotation for camera in cameras]),
        centres=torch.stack([camera.translation for camera in cameras]),
        focals=focals.to(world.dtype).clone(),
        depths=torch.stack(depths),
        similarities=_no_similarities(seen, score),
        size=size,
    )
    _fit_pairs(seen, geometry)
    geometry.fix_gauge()
    return geometry


def _own_maps(seen: Observations, score: Tensor) -> list[int]:
    """For each view its map in its own frame from the surest pair that has one."""
    own_maps = seen.place[:, 0]
    best = []
    for view, part in enumerate(seen.slices):
        mine = (own_maps >= part.start) & (own_maps < part.stop)
        edge = int(score.masked_fill(~mine, -1).argmax())
        if not score[edge] > 0:
            raise AdaptError(f"view {view} overlaps no other: no pair is sure enough of it")
        best.append(int(own_maps[edge]))
    return best


def _focal(seen: Observations, view: int, size: tuple[int, int]) -> Tensor:
    part = seen.slices[view]
    own = [k for k in seen.place[:, 0].tolist() if part.start <= k < part.stop]
    maps, weights = seen.points[own], seen.initial[own]
    with _about(f"view {view}"):
        return focal_of(maps.unflatten(1, size), weights.unflatten(1, size))


def _placed(seen: Observations, score: Tensor) -> Tensor:
    """World points [n, p, 3] of all views, from pair to pair along the tree."""
    best, place = _best_edges(seen, score)
    tree = spanning_tree(best)
    if len(tree) < seen.views - 1:
        placed = {view for pair in tree for view in pair}
        apart = [view for view in range(seen.views) if view not in placed]
        raise AdaptError(
            f"views {apart} overlap none of the others: no pair between them is sure enough"
        )
    world = seen.points.new_zeros(seen.views, *seen.points.shape[1:])
    root = tree[0][0]
    world[root] = seen.points[place[tree[0]][0]]
    for known, new in tree:
        one, other = place[known, new]
        with _about(f"views {known} and {new}"):
            into_world = _fit(seen.points[one], world[known], seen.initial[one])
        world[new] = into_world.apply(seen.points[other])
    return world


def _best_edges(
    seen: Observations, score: Tensor
) -> tuple[Tensor, dict[tuple[int, int], tuple[int, int]]]:
    """The better score of the two orders of each pair of views [n, n], and where its maps are."""
    view = torch.empty_like(seen.edge)
    for number, part in enumerate(seen.slices):
        view[part] = number
    best = score.new_full((seen.views, seen.views), -torch.inf)
    place: dict[tuple[int, int], tuple[int, int]] = {}
    for value, (one, other) in zip(score.tolist(), seen.place.tolist(), strict=True):
        i, j = int(view[one]), int(view[other])
        if value > 0 and value > best[i, j]:
            best[i, j] = best[j, i] = value
            place[i, j], place[j, i] = (one, other), (other, one)
    return best, place


@contextmanager
def _about(views: str) -> Iterator[None]:
    """Say of which views a fit failed."""
    try:
        yield
    except AdaptError as error:
        raise AdaptError(f"{views}: {error}") from None


def _fit(source: Tensor, target: Tensor, weights: Tensor) -> Similarity:
    counted = (weights > 0).nonzero()[:, 0]
    chosen = counted[:: max(1, len(counted) // ENOUGH_POINTS)]
    return fit_robustly(source[chosen], target[chosen], weights[chosen], steps=10)


def _depth(depth: Tensor) -> Tensor:
    """Depths in front of the camera; where there is none, the view's median."""
    front = depth > 0
    if not front.any():
        raise AdaptError("its own pointmap lies behind the camera")
    return torch.where(front, depth, depth[front].median())


def _no_similarities(seen: Observations, score: Tensor) -> Similarity:
    m, like = len(score), seen.points
    eye = torch.eye(3, dtype=like.dtype, device=like.device)
    return Similarity(like.new_ones(m), eye.repeat(m, 1, 1), like.new_zeros(m, 3))


def _fit_pairs(seen: Observations, geometry: Geometry) -> None:
    """Every pair onto the world points of its two views; a pair without weight keeps a unit."""
    view = [number for number, part in enumerate(seen.slices) for _ in range(*part.indices(10**9))]
    world = [geometry.world(number) for number in range(seen.views)]
    for edge, (one, other) in enumerate(seen.place.tolist()):
        source = seen.points[[one, other]].flatten(0, 1)
        target = torch.cat([world[view[one]], world[view[other]]])
        weights = seen.initial[[one, other]].flatten()
        if weights.any():
            with _about(f"views {view[one]} and {view[other]}"):
                geometry.similarities[edge] = _fit(source, target, weights)
