"""Two rays that see one point: how deep it is, and how far the rays miss each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Crossing(NamedTuple):
    """What two rays say, [..., n] each; depths are in baselines (the cameras' distance).

    parallax: grows as the depth shrinks, 0 for a point infinitely far, above pi/2 behind the camera
    depth:    log of the depth, cut to what the rays can tell apart
    angle:    sine of the angle between the rays times their lengths; near 0 nothing is known
    miss:     signed, 0 where the rays meet: by how much the pose or the match is wrong
    """

    parallax: Tensor
    depth: Tensor
    angle: Tensor
    miss: Tensor


def crossing(own: Tensor, other: Tensor, rotation: Tensor, centre: Tensor) -> Crossing:
    """What rays `own` [..., n, 3] of a camera and `other` [..., n, 3] of another one say.

    The other one stands at `centre` [..., 3]; `rotation` [..., 3, 3] takes its directions to this
    camera's frame. With a the own
    ray, c the other one turned, t the centre: z = ((a.t)(c.c) - (a.c)(c.t)) / |a x c|^2 is the
    depth of the point of a nearest to the other ray.

    >>> straight, right = torch.tensor([[[0.0, 0.0, 1.0]]]), torch.tensor([[1.0, 0.0, 0.0]])
    >>> leftwards = torch.tensor([[[-0.5, 0.0, 1.0]]])  # from 1 to the right: they meet 2 ahead
    >>> found = crossing(straight, leftwards, torch.eye(3)[None], right)
    >>> round(found.depth.exp().item(), 2), found.miss.item()
    (2.0, 0.0)
    """
    turned = other @ rotation.mT
    to = centre[..., None, :].expand_as(own)
    normal = torch.linalg.cross(own, turned)
    square = normal.square().sum(-1)
    lengths, between = turned.square().sum(-1), (own * turned).sum(-1)
    ahead = (own * to).sum(-1) * lengths - between * (turned * to).sum(-1)
    depth = (ahead.clamp_min(1e-3).log() - square.clamp_min(1e-4).log()).clamp(-2, 4)
    miss = (to * normal).sum(-1)
    return Crossing(torch.atan2(square + 1e-4, ahead + 1e-4), depth, (square + 1e-6).sqrt(), miss)
