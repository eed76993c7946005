"""How a picture of any size becomes the square that a SAM sees, and how its answer goes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...core.errors import AdaptError

Pixels = NDArray[np.uint8]
Mask = NDArray[np.uint8]
Colour = tuple[float, float, float]

SAM_MEAN = (123.675, 116.28, 103.53)
SAM_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True, kw_only=True)
class View:
    """What is done to a picture, as plain values that travel in the adapter file.

    The longer side becomes `side` pixels at the same aspect (bilinear with anti-aliasing), the
    picture lies in the top left corner of side x side, and every colour x of 0..255 becomes
    (x - mean) / std; the rest is zero. `stretch` first maps the picture's darkest and brightest
    value to 0 and 255; `pad_first` counts the padding as part of the picture in both.

    >>> view = View(side=4, mean=(0, 0, 0), std=(255, 255, 255))
    >>> view(np.full((2, 4, 3), 255, dtype=np.uint8))[0].tolist()
    [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """

    side: int = 1024
    mean: Colour = SAM_MEAN
    std: Colour = SAM_STD
    stretch: bool = False
    pad_first: bool = False

    def __post_init__(self) -> None:
        for name in ("mean", "std"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.side < 1:
            raise AdaptError(f"view: side={self.side} is not allowed: from 1 pixel")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise AdaptError(
                f"view: mean={self.mean}, std={self.std} is not allowed: three numbers each, the"
                " deviations above 0"
            )

    @staticmethod
    def sam(side: int = 1024) -> View:
        """What SAM was trained with (arXiv 2304.02643, its released code)."""
        return View(side=side)

    @staticmethod
    def medsam(side: int = 256) -> View:
        """What MedSAM and LiteMedSAM were trained with: each picture's values from 0 to 1."""
        return View(side=side, mean=(0, 0, 0), std=(255, 255, 255), stretch=True)

    @staticmethod
    def salt(side: int = 512) -> View:
        """What SALT's released code does (arXiv 2503.16055), its red deviation of 53.395 too."""
        std = (53.395, *SAM_STD[1:])
        return View(side=side, std=std, stretch=True, pad_first=True)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> View:
        """The values that `to_json` wrote; an unknown or missing one is refused by name."""
        known = {f.name for f in dataclasses.fields(View)}
        wrong = sorted(known ^ set(data))
        if wrong:
            raise AdaptError(f"view: {wrong[0]!r} is unknown or missing; it has {sorted(known)}")
        return View(**data)

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Height and width inside the square of a picture of this size.

        >>> View(side=100).scaled(300, 200), View(side=100).scaled(1, 1000)
        ((100, 67), (1, 100))
        """
        scale = self.side / max(height, width)
        # Halves upwards, as SAM rounds; a very long picture keeps one pixel across.
        return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)

    def __call__(self, pixels: Pixels) -> Tensor:
        """uint8 [h, w, 3] -> float32 [3, side, side]."""
        height, width = self.scaled(*pixels.shape[:2])
        small = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        seen = torch.from_numpy(np.array(small, dtype=np.float32)).permute(2, 0, 1)
        if self.pad_first:
            return self._valued(self._padded(seen))
        return self._padded(self._valued(seen))

    def mask(self, mask: Mask) -> Tensor:
        """uint8 [h, w] of 0 and 1 -> float32 [1, side, side] of 0 and 1: 1 from half a pixel on."""
        return (self.shares(mask) >= 0.5).float()

    def shares(self, mask: Mask) -> Tensor:
        """uint8 [h, w] of 0 and 1 -> float32 [1, side, side]: the share of each pixel's area."""
        height, width = self.scaled(*mask.shape)
        whole = Image.fromarray(mask * np.uint8(255))
        small = np.array(whole.resize((width, height), Image.Resampling.BOX), dtype=np.float32)
        return self._padded(torch.from_numpy(small)[None] / 255)

    def native(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits [..., h, w] of the whole square, at any resolution -> [..., *size]: the picture.

        To the square's own resolution first, then without its padding to the picture's size, both
        bilinear: threshold what comes back, not what goes in.
        """
        height, width = self.scaled(*size)
        maps = logits.reshape(-1, 1, *logits.shape[-2:])
        square = _resized(maps, (self.side, self.side))
        return _resized(square[..., :height, :width], size).reshape(*logits.shape[:-2], *size)

    def _valued(self, seen: Tensor) -> Tensor:
        if self.stretch:
            low, high = seen.min(), seen.max()
            # A picture of one value has nothing to stretch: it becomes black.
            seen = (seen - low) / (high - low).clamp(min=1e-8) * 255
        mean, std = (torch.tensor(c).view(3, 1, 1).float() for c in (self.mean, self.std))
        return (seen - mean) / std

    def _padded(self, seen: Tensor) -> Tensor:
        below, beside = self.side - seen.shape[-2], self.side - seen.shape[-1]
        return torch.nn.functional.pad(seen, (0, beside, 0, below))


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)
