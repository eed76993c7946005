"""Light in generated rooms: a bright day, or one lamp at night and a camera that then is noisy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .draw import Draw


@dataclass(frozen=True)
class Light:
    """A lamp below the ceiling and light from everywhere; colours are albedo times what arrives.

    ambient:  light from everywhere
    lamp:     the lamp's, where it falls on a surface at a right angle, close by
    reach:    metres after which half of it is left (it falls with 1 / (1 + (d / reach)^2))
    tint:     red, green, blue of all light
    noise:    the sensor's, standard deviation in units of full brightness
    """

    ambient: float
    lamp: float
    reach: float
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    noise: float = 0.0

    def on(self, albedo: Tensor, points: Tensor, normals: Tensor, lamp: Tensor) -> Tensor:
        """Colours [3, ...] of surfaces with `albedo` [3, ...] at points [..., 3]; lamp [3]."""
        away = lamp - points
        distance = away.norm(dim=-1).clamp_min(1e-6)
        facing = ((away * normals).sum(-1) / distance).clamp_min(0)
        brightness: Tensor = self.ambient + self.lamp * facing / (
            1 + (distance / self.reach).square()
        )
        tint: Tensor = torch.tensor(self.tint).view(3, *[1] * brightness.ndim)
        return albedo * brightness * tint

    def sensed(self, colours: Tensor, draw: Draw) -> Tensor:
        """With the sensor's noise, another one in each pixel."""
        return colours + self.noise * draw.normal(*colours.shape) if self.noise else colours


DAY = Light(ambient=0.65, lamp=0.55, reach=20.0)
NIGHT = Light(ambient=0.1, lamp=1.0, reach=2.0, tint=(1.0, 0.85, 0.6), noise=0.03)
