"""Image files in, one tensor of one size out; and where in the originals its pixels lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.errors import AdaptError
from ..core.images.classifying import image_files
from ..core.images.preprocessing import open_image

Centre = tuple[float, float]


@dataclass(frozen=True)
class Part:
    """Which part of an image a view shows; pixels are those of the upright image (after EXIF).

    A view's position (u, v) is (left + u / scale, top + v / scale) there, and a focal f of the
    view f / scale.
    """

    width: int
    height: int
    left: float
    top: float
    scale: float

    def focal_there(self, focal: float) -> float:
        """A view's focal in pixels of the original image."""
        return focal / self.scale

    def centre_there(self, size: tuple[int, int]) -> Centre:
        """Where the principal point of a view of `size` (height, width) lies in the original."""
        h, w = size
        return self.left + w / 2 / self.scale, self.top + h / 2 / self.scale


@dataclass(frozen=True, eq=False)
class Pictures:
    """n views [n, 3, h, w] in 0..1, their names and parts; and files left out as copies."""

    images: Tensor
    names: Sequence[str]
    parts: Sequence[Part]
    copies: Mapping[str, str]  # a file that was left out -> the one with the same pixels

    def __len__(self) -> int:
        return len(self.names)


def read_pictures(paths: Sequence[Path], size: tuple[int, int], least: int = 2) -> Pictures:
    """Files, and all images in folders among `paths`, as views of `size` (height, width).

    The rule: an image is turned upright as its EXIF says, becomes RGB (grey three times; what is
    transparent lies on white), and its largest part of the aspect h / w about its middle is
    resized (Lanczos) to `size`. So focals stay the same in both directions, pixels stay square,
    and an image of another orientation loses its ends. Images with the same pixels are read once.

    Raises AdaptError for an image that cannot be read (its name), a folder without images, and
    fewer than `least` different images.

    >>> Image.new("L", (80, 40), 51).save("grey.png"), Image.new("RGB", (30, 60)).save("tall.png")
    (None, None)
    >>> found = read_pictures([Path("grey.png"), Path("tall.png")], (12, 16))
    >>> found.images.shape, round(found.images[0].mean().item(), 4), found.parts[1].focal_there(16)
    (torch.Size([2, 3, 12, 16]), 0.2, 30.0)
    """
    kept: dict[str, tuple[str, Tensor, Part]] = {}
    copies = {}
    files = image_files(paths)
    for file, name in zip(files, _names(files), strict=True):
        image = open_image(file)
        digest = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
        if digest in kept:
            copies[name] = kept[digest][0]
        else:
            kept[digest] = (name, *view_of(image, size))
    if len(kept) < least:
        raise AdaptError(_too_few(files, copies, least))
    names, images, parts = zip(*kept.values(), strict=True)
    return Pictures(torch.stack(images), names, parts, copies)


def _names(files: Sequence[Path]) -> list[str]:
    """File names, or whole paths where two files have the same name."""
    short = [file.name for file in files]
    return short if len(set(short)) == len(short) else [file.as_posix() for file in files]


def _too_few(files: Sequence[Path], copies: Mapping[str, str], least: int) -> str:
    if copies:
        copy, original = next(iter(copies.items()))
        different = len(files) - len(copies)
        return (
            f"{len(files)} images are only {different} different ones ({copy} is {original} again):"
            f" at least {least} are needed"
        )
    given = "1 image is" if len(files) == 1 else f"{len(files)} images are"
    return f"{given} given: at least {least} different ones of a scene are needed"


def view_of(
    image: Image.Image, size: tuple[int, int], centre: Centre | None = None
) -> tuple[Tensor, Part]:
    """(view [3, h, w], its part) of an upright image; see `read_pictures` for the rule.

    `centre` is the image's principal point, if known: the part then is the largest about it, so
    that it becomes the view's middle.
    """
    part = part_of(image.size, size, centre)
    right, bottom = part.left + size[1] / part.scale, part.top + size[0] / part.scale
    box = (part.left, part.top, min(right, image.width), min(bottom, image.height))
    resized = _opaque(image).resize(size[::-1], Image.Resampling.LANCZOS, box=box)
    pixels = torch.from_numpy(np.array(resized, dtype=np.float32))
    return pixels.permute(2, 0, 1).contiguous() / 255, part


def part_of(whole: tuple[int, int], size: tuple[int, int], centre: Centre | None = None) -> Part:
    """The part of an image of `whole` (width, height) that a view of `size` shows."""
    (width, height), (h, w) = whole, size
    x, y = (width / 2, height / 2) if centre is None else centre
    across, down = 2 * min(x, width - x), 2 * min(y, height - y)
    if min(across, down) < 1:
        raise AdaptError(f"the principal point {x}, {y} is outside of an image of {width}x{height}")
    scale = max(w / across, h / down)
    return Part(width, height, x - w / 2 / scale, y - h / 2 / scale, scale)


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layered).convert("RGB")
