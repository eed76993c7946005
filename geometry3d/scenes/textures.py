"""Textures that tile the plane: fractal noise, checks and stripes; and their colour at a point."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .draw import Draw

TEXELS = 128  # of a side of coloured tiles


def noise(draw: Draw, channels: int, cells: int, layers: int, falloff: float) -> Tensor:
    """Value noise [channels, s, s] that tiles, of mean 0 and deviation about 1; s = 32 cells.

    The first layer has `cells` random values a side, interpolated, each further one twice as many,
    `falloff` times as strong as the one before.
    """
    whole = torch.zeros(channels, cells, cells)
    for layer in range(layers):
        whole = (_doubled(whole) if layer else whole) + falloff**layer * draw.normal(
            channels, cells << layer, cells << layer
        )
    for _ in range(layers, 6):
        whole = _doubled(whole)
    # Interpolating in two directions leaves 2/3 of the deviation.
    power: float = sum(falloff ** (2 * layer) for layer in range(layers))
    return whole * (1.5 / math.sqrt(power))


def _doubled(tile: Tensor) -> Tensor:
    """[c, s, s] -> [c, 2 s, 2 s], linear between neighbours, the last one's being the first."""
    rows = torch.stack([tile, (tile + tile.roll(-1, 1)) / 2], 2).flatten(1, 2)
    return torch.stack([rows, (rows + rows.roll(-1, 2)) / 2], 3).flatten(2, 3)


def checks(draw: Draw) -> Tensor:
    """[1, TEXELS, TEXELS] of 1 and -1: squares or, half of the time, stripes."""
    number = torch.arange(TEXELS) // (TEXELS >> draw.whole(2, 4))
    down = number * draw.whole(0, 1)
    return torch.where((number[None, :] + down[:, None]) % 2 == 0, 1.0, -1.0)[None]


def coloured(draw: Draw, pattern: Tensor, contrast: float) -> Tensor:
    """A pattern [1, s, s] as colours [3, s, s] in 0..1: two random colours, mixed by it."""
    middle, difference = draw.uniform(0.3, 0.7, 3, 1, 1), draw.normal(3, 1, 1)
    return (middle + F.normalize(difference, dim=0) * contrast * pattern).clamp(0, 1)


def colour_at(tiles: Tensor, which: Tensor | int, across: Tensor, down: Tensor) -> Tensor:
    """Colours [c, ...] of square tiles [m, c, s, s] number `which` at places [...].

    A tile covers 0..1 in both coordinates and repeats; between texels it is bilinear.
    """
    many, channels, side, _ = tiles.shape
    # One row and column more, so that the last texel meets the first; all tiles in one column.
    padded = F.pad(tiles, (0, 1, 0, 1), mode="circular")
    column = padded.transpose(0, 1).reshape(1, channels, -1, side + 1)
    x, y = across - across.floor(), down - down.floor()
    row = (which * (side + 1) + y * side) / (many * (side + 1) - 1)
    grid = (torch.stack([x, row], -1) * 2 - 1).view(1, 1, -1, 2)
    found = F.grid_sample(column, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return found.view(channels, *across.shape)


def eight_bits(colours: Tensor) -> Tensor:
    """Colours as a file of 8 bits keeps them: multiples of 1/255 in 0..1."""
    return (colours.clamp(0, 1) * 255).round() / 255
