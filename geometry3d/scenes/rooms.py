"""Furnished rooms: boxes and balls with texture, seen by cameras on a path, in metres."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.errors import AdaptError
from ..reconstruction import Reconstruction
from .bodies import Bodies, Hits, cast, normals
from .draw import Draw
from .light import DAY, NIGHT, Light
from .paths import RING, apart, orbit, walk
from .textures import checks, colour_at, coloured, eight_bits, noise
from .viewing import Rays, rays_of

_MATERIALS = 8
_FREE = RING[1] + 0.3  # things at the walls begin here


@dataclass(frozen=True)
class Conditions:
    """Under what a room is seen; with `moving`, one box stands elsewhere in every view."""

    light: Light = DAY
    path: Callable[[Draw, int], Tensor] = orbit
    moving: bool = False


CONDITIONS: Mapping[str, Conditions] = MappingProxyType(
    {
        "day": Conditions(),
        "night": Conditions(light=NIGHT),
        "narrow": Conditions(path=apart),
        "walk": Conditions(path=walk),
        "moving": Conditions(moving=True),
    }
)
"""The ones that scores are reported under, by name."""


@dataclass(frozen=True, eq=False)
class _Surfaces:
    """What colour k bodies have, by face: tiles' numbers, lengths of a tile, where it begins."""

    tiles: Tensor  # [m, 3, s, s]
    which: Tensor  # [k, 6]
    lengths: Tensor  # [k]
    begins: Tensor  # [2, k, 6]

    def at(self, hits: Hits) -> Tensor:
        """[3, v, r]"""
        places = hits.place / self.lengths[hits.body] + self.begins[:, hits.body, hits.face]
        return colour_at(self.tiles, self.which[hits.body, hits.face], *places)


def room(
    seed: int,
    conditions: Conditions | str = "day",
    views: int = 10,
    size: tuple[int, int] = (48, 64),
    focal: float | None = None,
    samples: int = 2,
) -> Reconstruction:
    """A room of 7 to 10 m with things in its middle and at its walls.

    The same seed gives the same room and things under all conditions. focal None: the image's width
    (53 degrees); each pixel's colour is the mean of samples x samples rays, its depth that of its
    centre. A moving box has its true depth and weight 0: no other view sees it there.

    Raises AdaptError for unknown conditions, none or more than 999 views, samples below 1.

    >>> night = room(0, "night", views=3)
    >>> night.images.shape, bool(night.images.mean() < room(0, views=3).images.mean() / 2)
    (torch.Size([3, 3, 48, 64]), True)
    """
    named = _known(conditions)
    if not 1 <= views <= 999 or samples < 1:
        raise AdaptError(f"{views} views of {samples} samples: 1 to 999 and at least 1 are allowed")
    things, taken = Draw("room", seed), Draw("room", "views", seed)
    bodies, lamp = _furnished(things, views, named.moving)
    surfaces = _painted(things, len(bodies.halves))
    poses = named.path(taken, views)
    length = float(size[1]) if focal is None else focal
    exact = cast(rays_of(poses, length, size), bodies)
    fine = rays_of(poses, length * samples, (size[0] * samples, size[1] * samples))
    lit = _lit(fine, bodies, surfaces, named.light, lamp)
    colours = F.avg_pool2d(lit.view(views, 3, size[0] * samples, -1), samples)
    depths = exact.depth.view(views, *size)
    weights = torch.ones_like(depths)
    if named.moving:
        weights[(exact.body == 1).view_as(weights)] = 0
    return Reconstruction(
        poses,
        torch.full((views,), length),
        depths,
        weights,
        eight_bits(named.light.sensed(colours, taken)),
        [f"room-{seed}-{view}" for view in range(views)],
    )


def _known(conditions: Conditions | str) -> Conditions:
    if isinstance(conditions, Conditions):
        return conditions
    if conditions not in CONDITIONS:
        raise AdaptError(f"unknown conditions {conditions!r}: there are {', '.join(CONDITIONS)}")
    return CONDITIONS[conditions]


def _lit(rays: Rays, bodies: Bodies, surfaces: _Surfaces, light: Light, lamp: Tensor) -> Tensor:
    """[v, 3, r], a view at a time: what a step needs then stays in the processor's cache."""
    seen = []
    for view in range(len(rays.origins)):
        one = Rays(*(part[view : view + 1] for part in rays))
        standing = Bodies(bodies.centres[view : view + 1], bodies.axes, bodies.halves, bodies.round)
        hits = cast(one, standing)
        points = one.origins[:, None] + hits.depth[..., None] * one.directions
        seen.append(light.on(surfaces.at(hits), points, normals(one, standing, hits), lamp))
    return torch.cat(seen, 1).transpose(0, 1)


def _furnished(draw: Draw, views: int, moving: bool) -> tuple[Bodies, Tensor]:
    """(bodies, lamp [3]): the room, the box that can move, furniture, balls; y points down."""
    outer = torch.tensor([draw.number(3.6, 5), 1.4, draw.number(3.6, 5)])
    wanderer = draw.uniform(0.25, 0.45, 1, 3)
    middle, walls, balls = draw.whole(3, 5), draw.whole(4, 6), draw.whole(2, 3)
    halves = torch.cat(
        [
            outer[None],
            wanderer,  # within 1 of the middle, like the next ones: out of the cameras' ring
            draw.uniform(0.15, 0.5, middle, 3),
            draw.uniform(0.2, 0.4, walls, 3) * torch.tensor([1, 2.5, 1]),
            draw.uniform(0.15, 0.4, balls, 1).expand(-1, 3),
        ]
    )
    inside, beside = (
        draw.uniform(-0.75, 0.75, middle + balls, 2),
        _at_walls(draw, walls, outer, halves),
    )
    places = torch.cat([torch.zeros(2, 2), inside[:middle], beside, inside[middle:]])
    heights = outer[1] - halves[:, 1]
    heights[0] = 0
    centres = torch.stack([places[:, 0], heights, places[:, 1]], -1).repeat(views, 1, 1)
    way = torch.linspace(-1, 1, views)[:, None] if moving else torch.ones(1, 1)
    ahead = F.normalize(draw.normal(2), dim=0)
    centres[:, 1, ::2] = way * ahead
    turns = draw.uniform(-torch.pi, torch.pi, len(halves))
    turns[0] = 0
    axes = _about_y(turns)
    lamp = torch.tensor([draw.number(-1.5, 1.5), -1.2, draw.number(-1.5, 1.5)])
    return Bodies(centres, axes, halves, balls), lamp


def _at_walls(draw: Draw, many: int, outer: Tensor, halves: Tensor) -> Tensor:
    """[many, 2] places near the four walls, outside the ring where cameras stand."""
    along = draw.uniform(-1, 1, many) * (outer[0] - 0.6)
    side = torch.where(draw.uniform(-1, 1, many) > 0, 1.0, -1.0)
    across = side * torch.minimum(outer[2] - 0.6, torch.tensor(_FREE + 0.6)).clamp_min(_FREE + 0.3)
    swapped = draw.uniform(0, 1, many) > 0.5
    return torch.stack(
        [torch.where(swapped, across, along), torch.where(swapped, along, across)], 1
    )


def _about_y(turns: Tensor) -> Tensor:
    axes = torch.zeros(len(turns), 3, 3)
    axes[:, 1, 1] = 1
    axes[:, 0, 0] = axes[:, 2, 2] = turns.cos()
    axes[:, 0, 2] = turns.sin()
    axes[:, 2, 0] = -turns.sin()
    return axes


def _painted(draw: Draw, bodies: int) -> _Surfaces:
    tiles = []
    for number in range(_MATERIALS):
        pattern = noise(draw, 1, 4, 4, draw.number(0.6, 1.0))
        if number % 2:
            pattern = 0.4 * pattern + checks(draw)
        tiles.append(coloured(draw, pattern, draw.number(0.15, 0.3)))
    which = torch.tensor([[draw.whole(0, _MATERIALS - 1) for _ in range(6)] for _ in range(bodies)])
    lengths = draw.uniform(1.5, 3.5, bodies)
    return _Surfaces(torch.stack(tiles), which, lengths, draw.uniform(0, 1, 2, bodies, 6))
