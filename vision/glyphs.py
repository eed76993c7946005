"""Generated images of letters: 26 classes, upper and lower case merged, no digits.

Letters of the fonts that matplotlib brings along are drawn once, then distorted afresh for every
batch. They are bright on a dark ground, never the other way round, and no digit is ever drawn, so
that digits, and inverted digits more so, are something that a backbone has to be adapted to.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .tiny_vit import IMAGE_SIZE

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

CLASSES = tuple(string.ascii_uppercase)
# All the fonts of matplotlib 3.10 and 3.11 that draw the 52 letters: the others are symbol fonts.
# The two held out have no sibling among the training fonts: Computer Modern's only sans serif and
# its only typewriter face.
HELD_OUT_FONTS = ("cmss10", "cmtt10")
TRAINING_FONTS = (
    *(f"DejaVuSans{cut}" for cut in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{cut}" for cut in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{cut}" for cut in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{cut}" for cut in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmti10", "cmmi10"),
)
CANVAS = 48


@dataclass(frozen=True)
class Distortion:
    """How far a glyph is distorted; the geometric fields are bounds of uniform draws."""

    rotation: float = 0.3  # radians
    shear: float = 0.3
    stretch: float = 0.25  # natural logarithm of the ratio of width to height
    size: float = 0.15  # natural logarithm
    shift: float = 0.12  # of half the image
    bend: float = 0.12  # of half the image: a smooth random displacement
    noise: float = 0.12  # largest standard deviation, of the full range of grey


class Glyphs:
    """The letters of some fonts, ready to be distorted in batches.

    >>> images, labels = Glyphs(["DejaVuSans"]).sample(5, Generator().manual_seed(0))
    >>> images.shape, labels.max() < 26
    (torch.Size([5, 1, 24, 24]), tensor(True))
    """

    def __init__(
        self, fonts: Sequence[str] = TRAINING_FONTS, distortion: Distortion | None = None
    ) -> None:
        self.distortion = distortion or Distortion()
        self.letters = _strokes(render_letters(fonts).flatten(0, 1))

    def sample(self, count: int, g: Generator) -> tuple[Tensor, Tensor]:
        """(images [count, 1, 24, 24] from 0 to 1, labels [count]); a function of g's state only."""
        faces, classes, widths = self.letters.shape[:3]
        face = torch.randint(faces, (count,), generator=g)
        label = torch.randint(classes, (count,), generator=g)
        width = torch.randint(widths, (count,), generator=g)
        grid = _grid(self.distortion, count, g)
        letters = F.grid_sample(self.letters[face, label, width], grid, align_corners=False)
        return _photographed(letters, self.distortion, g), label


def render_letters(fonts: Sequence[str] = TRAINING_FONTS) -> Tensor:
    """Draw A-Z in both cases of each font, filling the canvas: [fonts, 2, 26, 48, 48], 0 to 1.

    >>> render_letters(["DejaVuSans"]).shape
    torch.Size([1, 2, 26, 48, 48])
    """
    from matplotlib import get_data_path
    from PIL import ImageFont

    folder = Path(get_data_path()) / "fonts" / "ttf"
    rows = []
    for name in fonts:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 4 * CANVAS)
        rows += [_draw(letter, font) for letter in string.ascii_letters]
    return torch.stack(rows).view(len(fonts), 2, len(CLASSES), CANVAS, CANVAS)


def _draw(letter: str, font: FreeTypeFont) -> Tensor:
    from PIL import Image, ImageDraw

    left, top, right, bottom = (round(side) for side in font.getbbox(letter))
    image = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(image).text((-left, -top), letter, fill=255, font=font)
    scale = 0.8 * CANVAS / max(image.size)
    width, height = (max(1, round(scale * side)) for side in image.size)
    canvas = Image.new("L", (CANVAS, CANVAS), 0)
    small = image.resize((width, height), Image.Resampling.BOX)
    canvas.paste(small, ((CANVAS - width) // 2, (CANVAS - height) // 2))
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255)


def _strokes(letters: Tensor) -> Tensor:
    """[n, 26, 48, 48] -> [n, 26, 4, 1, 48, 48]: four stroke widths.

    Drawn once: dilating every batch afresh would cost more than a training step.
    """
    flat = letters.reshape(-1, 1, CANVAS, CANVAS)
    plain = _blur(flat)
    thin = _blur(-F.max_pool2d(-flat, 3, 1, 1))
    ink = flat.mean((2, 3), keepdim=True)
    thin = torch.where(thin.mean((2, 3), keepdim=True) > 0.5 * ink, thin, plain)  # not erased
    thick = _blur(F.max_pool2d(flat, 3, 1, 1))
    thicker = _blur(F.max_pool2d(flat, 5, 1, 2))
    stacked = torch.stack([thin, plain, thick, thicker], 1)
    return stacked.view(len(letters), len(CLASSES), 4, 1, CANVAS, CANVAS)


def _grid(d: Distortion, count: int, g: Generator) -> Tensor:
    """Where every pixel looks: an affine map and a smooth displacement, [count, 24, 24, 2]."""
    rotation, shear = _even(count, g=g) * d.rotation, _even(count, g=g) * d.shear
    stretch, size = _even(count, g=g) * d.stretch, torch.exp(_even(count, g=g) * d.size)
    x_shift, y_shift = _even(count, g=g) * d.shift, _even(count, g=g) * d.shift
    cos, sin = rotation.cos(), rotation.sin()
    x_scale, y_scale = size * torch.exp(stretch / 2), size * torch.exp(-stretch / 2)
    rows = [
        torch.stack([cos * x_scale, (shear * cos - sin) * x_scale, x_shift], 1),
        torch.stack([sin * y_scale, (shear * sin + cos) * y_scale, y_shift], 1),
    ]
    shape = [count, 1, IMAGE_SIZE, IMAGE_SIZE]
    affine = F.affine_grid(torch.stack(rows, 1), shape, align_corners=False)
    bend = _even(count, 2, 4, 4, g=g) * d.bend
    bend = F.interpolate(bend, size=shape[2:], mode="bicubic", align_corners=True)
    return affine + bend.permute(0, 2, 3, 1)


def _photographed(letters: Tensor, d: Distortion, g: Generator) -> Tensor:
    """Sharpness, contrast, ground and noise of a small picture."""
    n = len(letters)
    sharpness = torch.rand(n, 1, 1, 1, generator=g)
    sharp = sharpness * letters + (1 - sharpness) * _blur(letters)
    gain = 0.6 + 0.4 * torch.rand(n, 1, 1, 1, generator=g)
    ground = 0.15 * torch.rand(n, 1, 1, 1, generator=g)
    clean = (ground + sharp * gain).clamp(0, 1)
    noise = d.noise * torch.rand(n, 1, 1, 1, generator=g)
    return (clean + torch.randn(letters.shape, generator=g) * noise).clamp(0, 1)


def _even(*shape: int, g: Generator) -> Tensor:
    """Uniform in -1 to 1."""
    return torch.rand(*shape, generator=g) * 2 - 1


def _blur(images: Tensor) -> Tensor:
    """A 3x3 binomial filter."""
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    return F.conv2d(F.pad(images, (1, 1, 1, 1)), (line[:, None] * line)[None, None])
