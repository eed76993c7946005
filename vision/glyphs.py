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

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

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
    """How far a glyph is distorted; every field is the largest value of a uniform draw."""

    rotation: float = 0.3  # radians
    shear: float = 0.3
    stretch: float = 0.25  # natural logarithm of the ratio of width to height
    shift: float = 0.12  # of half the image
    bend: float = 0.12  # of half the image: a smooth random displacement
    noise: float = 0.12  # standard deviation, of the full range of grey


def render_letters(fonts: Sequence[str] = TRAINING_FONTS) -> Tensor:
    """Draw a-z and A-Z of each font, filling the canvas: [fonts, 2, 26, 48, 48], values 0 to 1.

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


def _draw(letter, font):
    from PIL import Image, ImageDraw
    import numpy as np

    left, top, right, bottom = font.getbbox(letter)
    image = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(image).text((-left, -top), letter, fill=255, font=font)
    scale = 0.8 * CANVAS / max(image.size)
    size = [max(1, round(scale * side)) for side in image.size]
    canvas = Image.new("L", (CANVAS, CANVAS), 0)
    canvas.paste(
        image.resize(size, Image.Resampling.BOX), tuple((CANVAS - side) // 2 for side in size)
    )
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255)


def _blur(x):
    k = torch.tensor([1.0, 2, 1]) / 4
    k = (k[:, None] * k)[None, None]
    return F.conv2d(F.pad(x, (1, 1, 1, 1)), k)


class Glyphs:
    def __init__(self, fonts, image_size=24, distortion=Distortion()):
        base = render_letters(fonts).flatten(0, 1)  # F*2, 26, 48,48
        n = base.shape[0]
        flat = base.view(-1, 1, CANVAS, CANVAS)
        # Three stroke widths, drawn once: dilating every batch afresh would cost more than a step.
        thin = _blur(-F.max_pool2d(-flat, 3, 1, 1))
        plain = _blur(flat)
        thick = _blur(F.max_pool2d(flat, 3, 1, 1))
        thicker = _blur(F.max_pool2d(flat, 5, 1, 2))
        # a thin stroke that erosion deletes stays as it is
        ink = flat.mean((2, 3), keepdim=True)
        thin = torch.where(thin.mean((2, 3), keepdim=True) > 0.5 * ink, thin, plain)
        self.letters = torch.stack([thin, plain, thick, thicker], 1).view(n, 26, 4, 1, CANVAS, CANVAS)
        self.image_size, self.d = image_size, distortion

    def sample(self, count, g):
        d, s = self.d, self.image_size
        L = self.letters
        face = torch.randint(L.shape[0], (count,), generator=g)
        label = torch.randint(26, (count,), generator=g)
        width = torch.randint(4, (count,), generator=g)
        src = L[face, label, width]

        def u(*shape):
            return torch.rand(count, *shape, generator=g) * 2 - 1

        rot, shear, st = u() * d.rotation, u() * d.shear, u() * d.stretch
        size = torch.exp(u() * 0.15 + 0.0)
        c, sn = rot.cos(), rot.sin()
        sx, sy = size * torch.exp(st / 2), size * torch.exp(-st / 2)
        m = torch.stack([
            torch.stack([c * sx, (-sn + shear * c) * sx, u() * d.shift], 1),
            torch.stack([sn * sy, (c + shear * sn) * sy, u() * d.shift], 1)], 1)
        grid = F.affine_grid(m, (count, 1, s, s), align_corners=False)
        bend = F.interpolate(u(2, 4, 4) * d.bend, size=(s, s), mode="bicubic", align_corners=True)
        x = F.grid_sample(src, grid + bend.permute(0, 2, 3, 1), align_corners=False)
        # resolution
        coarse = F.interpolate(F.adaptive_avg_pool2d(x, 8), size=(s, s), mode="bilinear", align_corners=False)
        mix = torch.rand(count, 1, 1, 1, generator=g)
        low = (torch.rand(count, 1, 1, 1, generator=g) < 0.4)
        x = torch.where(low, coarse, mix * x + (1 - mix) * _blur(x))
        gain = 0.6 + 0.4*torch.rand(count, 1, 1, 1, generator=g)
        ground = 0.15 * torch.rand(count, 1, 1, 1, generator=g)
        x = (ground + x * gain).clamp(0, 1)
        x = x + torch.randn(x.shape, generator=g) * d.noise * torch.rand(count, 1, 1, 1, generator=g)
        return x.clamp(0, 1), label
