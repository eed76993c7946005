"""Boxes and ellipsoids, and where rays meet them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .viewing import Rays


@dataclass(frozen=True, eq=False)
class Bodies:
    """k bodies, seen in v views; the last `round` of them are ellipsoids, the others boxes.

    A box with the camera inside is a room: rays meet its walls.
    """

    centres: Tensor  # [v, k, 3]: a moving body has another one in each view
    axes: Tensor  # [k, 3, 3]: column i is the body's i-th axis in the world
    halves: Tensor  # [k, 3]: half of its size along its axes
    round: int = 0


class Hits(NamedTuple):
    """What each ray meets first."""

    depth: Tensor  # [v, r]; infinite where it meets nothing
    body: Tensor  # [v, r]
    face: Tensor  # [v, r] 0..5: the body's axis that stands out most there, twice, + 1 if ahead
    place: Tensor  # [2, v, r]: the two other coordinates in the body's frame, lengths
    met: Tensor  # [3, v, r]: the point in the body's frame, where the body is from -1 to 1


def cast(rays: Rays, bodies: Bodies) -> Hits:
    """Meet all rays [v, r] with all bodies."""
    origins, directions = _in_their_units(rays, bodies)  # [3, k, v, 1], [3, k, v, r]
    boxes = len(bodies.halves) - bodies.round
    found = [_boxes(origins[:, :boxes], directions[:, :boxes])]
    if bodies.round:
        found.append(_balls(origins[:, boxes:], directions[:, boxes:]))
    depth, body = torch.cat(found).min(0)
    views = torch.arange(len(depth))[:, None]
    along = directions.gather(1, body.expand(3, 1, *body.shape))[:, 0]
    met = origins[:, body, views, 0] + depth * along
    return Hits(depth, body, *_on_face(met, bodies.halves.T[:, body]), met)


def _on_face(met: Tensor, halves: Tensor) -> tuple[Tensor, Tensor]:
    """(face, place) of points in their bodies' frames; by comparing, argmax being far slower."""
    x, y, z = met.abs()
    first, second = (x >= y) & (x >= z), y >= z
    axis = torch.where(first, 0, torch.where(second, 1, 2))
    outward = torch.where(first, met[0], torch.where(second, met[1], met[2]))
    a, b, c = met * halves
    across = torch.where(first, b, torch.where(second, c, a))
    down = torch.where(first, c, torch.where(second, a, b))
    return 2 * axis + (outward > 0), torch.stack([across, down])


def normals(rays: Rays, bodies: Bodies, hits: Hits) -> Tensor:
    """[v, r, 3] in the world, of length 1, towards the camera."""
    met = hits.met.permute(1, 2, 0)
    ball = hits.body >= len(bodies.halves) - bodies.round
    flat = F.one_hot(hits.face // 2, 3) * met.sign()
    outward = torch.where(ball[..., None], met / bodies.halves[hits.body], flat)
    turned = (bodies.axes[hits.body] * outward[..., None, :]).sum(-1)
    towards = -(turned * rays.directions).sum(-1, keepdim=True).sign()
    return F.normalize(turned, dim=-1) * towards


def _in_their_units(rays: Rays, bodies: Bodies) -> tuple[Tensor, Tensor]:
    """Origins and directions where each body is the cube, or ball, from -1 to 1."""
    into = (bodies.axes / bodies.halves[:, None]).permute(2, 0, 1)  # [axis, k, 3]
    views, many = rays.directions.shape[:2]
    directions = into.reshape(-1, 3) @ rays.directions.reshape(-1, 3).T
    away = rays.origins[:, None] - bodies.centres  # [v, k, 3]
    origins = (into[:, :, None] * away.transpose(0, 1)).sum(-1)
    return origins[..., None], directions.view(3, -1, views, many)


def _boxes(origins: Tensor, directions: Tensor) -> Tensor:
    """The slab test: between the last entry and the first exit of three pairs of planes."""
    inverse = (directions + 1e-20).reciprocal_()  # never 1 / 0
    half = inverse.abs()
    middle = inverse.mul_(-origins)
    near, far = middle - half, middle.add_(half)
    enter = torch.maximum(torch.maximum(near[0], near[1]), near[2])
    leave = torch.minimum(torch.minimum(far[0], far[1]), far[2])
    depth = torch.where(enter > 0, enter, leave)
    return depth.masked_fill_((leave < enter) | (leave <= 0), torch.inf)


def _balls(origins: Tensor, directions: Tensor) -> Tensor:
    """The nearer root of |o + t d|^2 = 1."""
    a, b = directions.square().sum(0), (origins * directions).sum(0)
    c = origins.square().sum(0) - 1
    under = b * b - a * c
    depth = (-b - under.clamp_min(0).sqrt()) / a
    return depth.masked_fill_((under < 0) | (depth <= 0), torch.inf)
