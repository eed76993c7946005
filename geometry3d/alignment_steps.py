"""One sweep of an alignment: every camera onto its pairs, then every pair onto its cameras.

Both halves are closed forms or nearly so; there is no learning rate that could throw an exact
start off. The residuals' lengths e are brought under a square by reweighting: w e becomes
w e^2 / sqrt(e0^2 + s^2) with e0 the length before the sweep, which lies above it and touches it
(up to the softening s), so that no sweep raises the cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import AdaptError
from .focal import focal_of
from .geometry import Geometry
from .observations import Observations
from .rotations import cross_matrix, rotation_of
from .similarity import Moments

DAMPING = 1e-6  # relative, of the cameras' systems: only to make them solvable
NEAREST = 1e-6  # the least depth, in the alignment's unit
OUT_OF_RANGE = "points, confidences or focals are too large or too small for numbers of 32 bits"


def sweep(seen: Observations, geometry: Geometry, softening: float, know_focals: bool) -> None:
    """Improve `geometry` in place, holding the weights; `softening` is a length."""
    parts, cost = [], geometry.depths.new_zeros(())
    for view, part in enumerate(seen.slices):
        points = seen.points[part]
        middle, pull, costs = _asked(seen, geometry, view, softening)
        cost += costs
        _move_camera(geometry, view, middle, pull.sum(0), know_focals)
        parts.append(Moments.of(points, geometry.world(view).expand_as(points), pull))
    _fit_pairs(seen, geometry, Moments.joined(parts), cost)


def reseat(seen: Observations, geometry: Geometry, softening: float, know_focals: bool) -> None:
    """Put cameras where a pair that begins with them has them, if that costs less, in place.

    A pair's frame is its first view's camera. With weights that have fallen, the own maps tell a
    view's focal anew: a camera that outliers had drawn off far does not find back in small steps.
    """
    own = seen.place[:, 0]
    for view, part in enumerate(seen.slices):
        mine = own[(own >= part.start) & (own < part.stop)]
        try:
            focal = geometry.focals[view] if know_focals else _told(seen, geometry, mine)
        except AdaptError:  # no focal fits: the camera stays
            continue
        surest = seen.edge[mine[seen.weights[mine].sum(1).argmax()]]
        frame = geometry.similarities[surest]
        target, pull, _ = _asked(seen, geometry, view, softening)
        weight = pull.sum(0)
        before = (geometry.rotations[view], geometry.centres[view], geometry.focals[view])
        after = (frame.rotation, frame.translation, focal)
        depths, cost = _fitted(geometry, target, weight, *after)
        if cost < _fitted(geometry, target, weight, *before)[1]:
            _put(geometry, view, *after, torch.where(weight > 0, depths, geometry.depths[view]))


def _told(seen: Observations, geometry: Geometry, maps: Tensor) -> Tensor:
    """The focal that a view's own maps imply under the weights as they are now."""
    points, weights = seen.points[maps], seen.weights[maps]
    return focal_of(points.unflatten(1, geometry.size), weights.unflatten(1, geometry.size))


def _asked(
    seen: Observations, geometry: Geometry, view: int, softening: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the maps would have the view's points [p, 3], their pulls [k, p], and the cost."""
    part = seen.slices[view]
    said = geometry.similarities[seen.edge[part]].apply(seen.points[part])
    squared = (said - geometry.world(view)).square().sum(-1)
    pull = seen.weights[part] / (squared + softening**2).sqrt()
    middle = (pull[..., None] * said).sum(0) / pull.sum(0).clamp_min(1e-30)[:, None]
    return middle, pull, (pull * squared).sum()


def residuals(seen: Observations, geometry: Geometry) -> Tensor:
    """|world point - similarity(predicted point)| of every observation, [k, p]."""
    lengths = []
    for view, part in enumerate(seen.slices):
        said = geometry.similarities[seen.edge[part]].apply(seen.points[part])
        lengths.append((said - geometry.world(view)).norm(dim=-1))
    return torch.cat(lengths)


def _fit_pairs(seen: Observations, geometry: Geometry, moments: Moments, cost: Tensor) -> None:
    both = moments[seen.place[:, 0]] + moments[seen.place[:, 1]]
    counted = both.weight > 0
    # The gauge holds the product of the scales, each to the power of its pair's share of all
    # weight: each is pulled up by that share of the cost, else noisy pairs would shrink and the
    # rest be blown up for it. Were the shares alike, a pair that has lost nearly all weight would
    # be pulled as hard with nothing to hold it: its scale would run away, and shrink the world.
    share = seen.by_edge(seen.weights.sum(1)).sum(1)
    share = torch.where(counted, share, 0.0)
    share = share / share.sum()
    geometry.similarities[counted] = both[counted].similarity(pull=cost * share[counted])
    geometry.fix_gauge(share)


def _move_camera(
    geometry: Geometry, view: int, target: Tensor, weight: Tensor, know_focal: bool
) -> None:
    """A Gauss-Newton step of pose and focal towards points [p, 3], all depths eliminated.

    A step that does not lower the cost is tried shorter, then left out. A cost that is no number
    would spread from here to every pair: AdaptError.
    """
    rotation, centre = geometry.rotations[view], geometry.centres[view]
    focal = geometry.focals[view]
    step = _step((target - centre) @ rotation, geometry.rays(focal), weight, know_focal)
    lowest = torch.inf
    for share in (0.0, 1.0, 0.25):
        turned = rotation @ rotation_of(share * step[:3])
        moved = centre + rotation @ (share * step[3:6])
        # In proportion: a camera that backs off as its focal grows sees a plane as before, and
        # along that valley the one is linear in the other.
        longer = focal * (1 + share * step[6]).clamp_min(0.1)
        depths, cost = _fitted(geometry, target, weight, turned, moved, longer)
        if cost < lowest:
            lowest = cost
            kept = torch.where(weight > 0, depths, geometry.depths[view])
            best = (turned, moved, longer, kept)
            if share == 1.0:
                break
    if lowest == torch.inf:
        raise AdaptError(f"view {view}: the alignment's cost is no number: {OUT_OF_RANGE}")
    _put(geometry, view, *best)


def _fitted(
    geometry: Geometry,
    target: Tensor,
    weight: Tensor,
    rotation: Tensor,
    centre: Tensor,
    focal: Tensor,
) -> tuple[Tensor, float]:
    """The depths [p] that bring such a camera's points nearest to the target, and the cost."""
    points, rays = (target - centre) @ rotation, geometry.rays(focal)
    depths = _depths(points, rays)
    return depths, float((weight * (points - depths[:, None] * rays).square().sum(-1)).sum())


def _put(
    geometry: Geometry, view: int, rotation: Tensor, centre: Tensor, focal: Tensor, depths: Tensor
) -> None:
    geometry.rotations[view], geometry.centres[view] = rotation, centre
    geometry.focals[view], geometry.depths[view] = focal, depths


def _depths(points: Tensor, rays: Tensor) -> Tensor:
    """How far along its ray each point [p, 3] is nearest to it, [p]."""
    return ((points * rays).sum(-1) / rays.square().sum(-1)).clamp_min(NEAREST)


def _step(points: Tensor, rays: Tensor, weight: Tensor, know_focal: bool) -> Tensor:
    """(turn, move, log of focal) [7] that brings the rays nearest to the points, linearised.

    `points` [p, 3] in the camera's frame. Of the residual point - depth * ray only what is across
    the ray counts: the depth takes up what is along it.
    """
    depths = _depths(points, rays)
    turn = cross_matrix(points)  # d(exp(-w) q) = -w x q = q x w
    move = -torch.eye(3, dtype=points.dtype, device=points.device).expand_as(turn)
    flat = rays * rays.new_tensor([1, 1, 0])  # d(ray) / d(log f) = -flat
    columns = [turn, move, (depths[:, None] * flat)[..., None]]
    jacobian = torch.cat(columns[: 2 if know_focal else 3], -1)
    along = rays / rays.norm(dim=-1, keepdim=True)
    across = jacobian - along[..., None] * (along[:, None, :] @ jacobian)
    residual = (points - depths[:, None] * rays)[..., None]
    system = (across.mT @ (weight[:, None, None] * across)).sum(0).double()
    right = (across.mT @ (weight[:, None, None] * residual)).sum(0).double()
    system += DAMPING * system.diagonal().mean() * torch.eye(len(system)).to(system)
    step = torch.zeros(7, 1).to(system)
    step[: len(system)] = torch.linalg.solve(system, -right)
    return step[:, 0].to(points.dtype)
