"""Scenes that one image tells nothing about: only a match with a second image gives the shape.

One noise texture of random scale and stretch covers everything, without light and shadow: neither
brightness, nor the size or the slant of texture, nor the objects' kinds betray a depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import AdaptError
from ..overlap import overlap
from ..reconstruction import Reconstruction
from .bodies import Bodies, cast
from .draw import Draw
from .heights import Heights, meet
from .textures import colour_at, eight_bits, noise
from .viewing import Rays, looking, rays_of

LEAST_OVERLAP, LEAST_BASELINE = 0.2, 0.05
_COARSE = 16  # columns of the images that tell how much views overlap
_TRIES = 300
Shape = Callable[[Rays], tuple[Tensor, Tensor, Tensor]]  # depth and (u, v) on the texture, [v, r]


@dataclass(frozen=True)
class Shift:
    """How scenes differ from those a network has learnt on, in the same way in all views.

    arc:    degrees; the cameras stand on an arc around the middle, not in front of it
    level:  brightness, 1 by day
    noise:  the sensor's, standard deviation in units of full brightness
    """

    arc: float = 0.0
    level: float = 1.0
    noise: float = 0.0


NONE, ORBIT, NIGHT = Shift(), Shift(arc=70.0), Shift(level=0.25, noise=0.02)


def camouflaged(
    seed: int,
    views: int = 4,
    size: tuple[int, int] = (48, 64),
    focal: float | None = None,
    shift: Shift = NONE,
    poses: Tensor | None = None,
) -> Reconstruction:
    """A heightfield (even seeds) or boxes before a wall (odd seeds), under one noise texture.

    The surface is about 1 away. The views' pairs overlap by 0.2 to 1 (in a scene much or little,
    as drawn), their baselines are 0.05 to 0.6, in an orbit to 1.2; focal None: the image's width
    (53 degrees). A shift of the light leaves the scene of a seed as it is. `poses` [views, 4, 4]:
    the cameras, in place of drawn ones.

    Raises AdaptError for no views, a focal below half the longer side, more views than fit, and
    poses of another number.

    >>> scene = camouflaged(3)
    >>> scene.images.shape, scene.names[0]
    (torch.Size([4, 3, 48, 64]), 'camouflaged-3-0')
    """
    length = float(size[1]) if focal is None else focal
    if views < 1 or min(size) < 1 or not length >= 0.5 * max(size):
        raise AdaptError(
            f"{views} views of {size[1]}x{size[0]} pixels with a focal of {length:g}: at least one"
            " view and half the longer side are wanted"
        )
    if poses is not None and len(poses) != views:
        raise AdaptError(f"{len(poses)} poses are given for {views} views")
    draw = Draw("camouflaged", seed)
    shape = _boxes(draw) if seed % 2 else _heightfield(draw)
    tile = _tile(draw)
    if poses is None:
        poses = _cameras(draw, shape, views, length / size[1], size[0] / size[1], shift.arc)
    depth, across, down = shape(rays_of(poses, length, size))
    colours = shift.level * colour_at(tile, 0, across, down)
    if shift.noise:
        colours = colours + shift.noise * draw.normal(*colours.shape)
    images = eight_bits(colours).transpose(0, 1).reshape(views, 3, *size)
    return _scene(f"camouflaged-{seed}", poses, length, depth.view(views, *size), images)


def _scene(
    name: str, poses: Tensor, focal: float, depths: Tensor, images: Tensor
) -> Reconstruction:
    names = [f"{name}-{view}" for view in range(len(poses))]
    focals = torch.full((len(poses),), focal)
    return Reconstruction(poses, focals, depths, torch.ones_like(depths), images, names)


def _cameras(
    draw: Draw, shape: Shape, views: int, focal: float, aspect: float, arc: float
) -> Tensor:
    """Poses whose pairs overlap enough, drawn closer together until they do; focal in widths."""
    coarse = (max(4, round(_COARSE * aspect)), _COARSE)
    spread = 1.0 if arc else draw.number(0.1, 1.0)
    for _ in range(_TRIES):
        poses = (
            _around(draw, views, spread * arc) if arc else _before(draw, views, spread, 1 / focal)
        )
        if _least_baseline(poses) >= LEAST_BASELINE:
            depth = shape(rays_of(poses, _COARSE * focal, coarse))[0].view(views, *coarse)
            scene = _scene("", poses, _COARSE * focal, depth, torch.zeros(views, 3, *coarse))
            if depth.isfinite().all() and overlap(scene).min() > LEAST_OVERLAP:
                return poses
        spread *= 0.9
    raise AdaptError(
        f"{views} cameras do not fit before one surface, each {LEAST_BASELINE} from all others and"
        f" each pair overlapping by {LEAST_OVERLAP}: ask for fewer or a shorter focal"
    )


def _least_baseline(poses: Tensor) -> float:
    origins = poses[:, :3, 3]
    return float((torch.cdist(origins, origins) + torch.eye(len(poses))).min())


def _before(draw: Draw, views: int, spread: float, width: float) -> Tensor:
    """Cameras near the origin that look at places 1 ahead, up to `spread` widths apart."""
    aside = torch.tensor([0.8 * width, 0.6 * width, 0.0]) * spread
    targets = aside * draw.uniform(-0.5, 0.5, views, 3) + torch.tensor([0.0, 0.0, 1.0])
    follow, base = draw.number(0, 1), draw.number(0.1, 0.3)
    origins = follow * targets * torch.tensor([1.0, 1.0, 0.0])
    origins += base * draw.uniform(-1, 1, views, 3) * torch.tensor([1.0, 1.0, 0.5])
    return looking(origins, targets, draw, roll=15)


def _around(draw: Draw, views: int, arc: float) -> Tensor:
    """Cameras on an arc of so many degrees around the middle of the scene, looking at it."""
    middle = torch.tensor([0.0, 0.0, 1.0])
    angle = math.radians(arc) * torch.linspace(-0.5, 0.5, views) + draw.number(-0.15, 0.15)
    radius, height = draw.uniform(0.9, 1.1, views), draw.uniform(-0.2, 0.2, views)
    away = torch.stack([radius * angle.sin(), height, -radius * angle.cos()], -1)
    return looking(middle + away, middle + draw.uniform(-0.05, 0.05, views, 3), draw, roll=15)


def _tile(draw: Draw) -> Tensor:
    """[1, 3, s, s]: grey noise with some of every colour."""
    pattern = noise(draw, 4, 4, 5, draw.number(0.7, 1.1))
    colour, contrast = draw.number(0.2, 0.8), draw.number(0.12, 0.25)
    return (draw.number(0.4, 0.6) + contrast * (pattern[:1] + colour * pattern[1:])).clamp(0, 1)[
        None
    ]


def _onto_texture(draw: Draw, many: int) -> Tensor:
    """Random maps [6, many] of lengths to tiles: (x, y) -> (a x + b y + e, c x + d y + f).

    A tile is 1.5 to 5 long, stretched by up to 1.6 in a random direction.
    """
    size, stretch = draw.uniform(1.5, 5.0, many), draw.uniform(1.0, 1.6, many).sqrt()
    (c, s), (k, t) = ((t.cos(), t.sin()) for t in draw.uniform(0, 2 * math.pi, 2, many))
    long, short = stretch / size, 1 / (stretch * size)
    a, b = long * c * k - short * s * t, -long * c * t - short * s * k
    d, e = long * s * k + short * c * t, -long * s * t + short * c * k
    return torch.stack([a, b, d, e, *draw.uniform(0, 1, 2, many)])


def _mapped(onto: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    a, b, c, d, e, f = onto
    return a * x + b * y + e, c * x + d * y + f


def _heightfield(draw: Draw) -> Shape:
    axes, onto = draw.turns(15), _onto_texture(draw, 1)
    grid = noise(draw, 1, draw.whole(3, 5), 2, 0.4)[0]
    heights = Heights(1 + draw.number(0.03, 0.15) * grid, 2.0, axes)

    def shape(rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
        depth, x, y = meet(rays, heights)
        return depth, *_mapped(onto, x, y)

    return shape


def _boxes(draw: Draw) -> Shape:
    many = draw.whole(3, 9)
    depth = draw.uniform(0.55, 1.05, many, 1)
    boxes = torch.cat([draw.uniform(-0.55, 0.55, many, 2) * depth, depth], 1)
    centres = torch.cat([torch.tensor([[0.0, 0.0, 2.2]]), boxes])  # a wall behind them
    halves = torch.cat([torch.tensor([[9.0, 9.0, 1.0]]), draw.uniform(0.05, 0.16, many, 3)])
    axes = torch.cat([draw.turns(15, 1), draw.turns(180, many)])
    onto = _onto_texture(draw, many + 1)

    def shape(rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
        views = len(rays.origins)
        hits = cast(rays, Bodies(centres.expand(views, -1, -1), axes, halves))
        u, v = _mapped(onto[:, hits.body], *hits.place)
        return hits.depth, u + 0.37 * hits.face, v  # no face goes on where its neighbour ends

    return shape
