"""How an image becomes what a backbone wants: resize, crop, scale; and how training varies it."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..errors import AdaptError

Augmentation = Literal["none", "flip", "random_resized_crop"]
Mode = Literal["backbone", "imagenet", "vtab_orig", "vtab_vpt", "vtab_fact", "vtab_raw"]
Box = tuple[float, float, float, float]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Interpolation, mean and std (None: the backbone's) of the lines of work on VTAB-1k.
_VTAB: dict[str, tuple[str, tuple[float, ...] | None, tuple[float, ...] | None]] = {
    "vtab_orig": ("bilinear", None, None),
    "vtab_vpt": ("bilinear", IMAGENET_MEAN, IMAGENET_STD),
    "vtab_fact": ("bicubic", IMAGENET_MEAN, IMAGENET_STD),
    "vtab_raw": ("bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What is done to an image, as plain values that travel in the adapter file.

    Evaluation does what timm does: resize so that the image just covers `size` (height, width)
    divided by `crop_pct`, cut `size` out of its middle, and return (x / 255 - mean) / std.
    crop_mode "squash" resizes to size / crop_pct whatever the image's shape. Greys become three
    equal channels, and colours one grey, as `mean` has three entries or one.

    >>> wants = Preprocessing(size=(2, 2), mean=(0.5,), std=(0.5,))
    >>> wants(Image.new("RGB", (6, 4), "white")).tolist()
    [[[1.0, 1.0], [1.0, 1.0]]]
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _require(len(self.size) == 2 and min(self.size) >= 1, "size", self.size, "(height, width)")
        _require(len(self.mean) in _MODES, "mean", self.mean, "one or three numbers")
        fits = len(self.std) == len(self.mean) and min(self.std) > 0
        _require(fits, "std", self.std, "as many numbers as the mean, above 0")
        allowed = ", ".join(_INTERPOLATIONS)
        _require(
            self.interpolation in _INTERPOLATIONS, "interpolation", self.interpolation, allowed
        )
        _require(0 < self.crop_pct <= 1, "crop_pct", self.crop_pct, "above 0, at most 1")
        known = self.crop_mode in ("center", "squash")
        _require(known, "crop_mode", self.crop_mode, "center, squash")

    @staticmethod
    def of(model: nn.Module, img_size: int | None = None, channels: int = 3) -> Preprocessing:
        """What timm says that this model was trained with, for images of another size if given."""
        from timm.data import resolve_model_data_config

        config = resolve_model_data_config(model)
        height, width = config["input_size"][-2:] if img_size is None else (img_size, img_size)
        mean, std = config["mean"], config["std"]
        if channels == 1 and len(mean) == 3:  # timm sums the filters of the three colours
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
        return Preprocessing(
            size=(height, width),
            mean=mean,
            std=std,
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
        )

    def imagenet(self) -> Preprocessing:
        """ImageNet's usual preprocessing at this size, whatever the backbone was trained with."""
        return Preprocessing(
            size=self.size,
            mean=self._of_my_channels(IMAGENET_MEAN),
            std=self._of_my_channels(IMAGENET_STD),
            interpolation="bilinear",
            crop_pct=0.875,
        )

    def in_mode(self, mode: Mode) -> Preprocessing:
        """These settings, being a backbone's own, under one of the names that papers differ by.

        ===========  ==========================================================================
        `backbone`   as they are
        `imagenet`   see `imagenet`
        `vtab_orig`  squashed to the size, bilinear, the backbone's mean and std (Adapter+)
        `vtab_vpt`   the same with ImageNet's mean and std (VPT, MoSA)
        `vtab_fact`  squashed, bicubic, ImageNet's mean and std (FacT, Convpass, Hydra)
        `vtab_raw`   squashed, bicubic, pixels from 0 to 1 as they are (Bi-AdaptFormer, FPET)
        ===========  ==========================================================================

        Numbers of two `vtab_` modes do not belong in one table: the mode moves a mean over VTAB-1k
        by more than a point. (VPT and Adapter+ resize in TensorFlow, here PIL does it.)
        """
        if mode not in _VTAB:
            return self.imagenet() if mode == "imagenet" else self
        interpolation, mean, std = _VTAB[mode]
        return Preprocessing(
            size=self.size,
            mean=self.mean if mean is None else self._of_my_channels(mean),
            std=self.std if std is None else self._of_my_channels(std),
            interpolation=interpolation,
            crop_mode="squash",
        )

    def _of_my_channels(self, colours: tuple[float, ...]) -> tuple[float, ...]:
        return (sum(colours) / 3,) if len(self.mean) == 1 else colours

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Preprocessing:
        """The values that `to_json` wrote; an unknown or missing one is refused by name."""
        known = {f.name for f in dataclasses.fields(Preprocessing)}
        wrong = sorted(known ^ set(data))
        if wrong:
            raise AdaptError(f"preprocessing: {wrong[0]!r} is unknown or missing; it has {known}")
        return Preprocessing(**data)

    def __call__(self, image: Image.Image) -> Tensor:
        """Image -> [channels, height, width], always the same."""
        return self.scaled(self.view(image))

    def view(self, image: Image.Image) -> Image.Image:
        """The part of the image that evaluation looks at, in the size that the backbone wants."""
        height, width = (math.floor(side / self.crop_pct) for side in self.size)
        if self.crop_mode == "center":
            height, width = _covering(image.height, image.width, height, width)
        resized = self.converted(image).resize((width, height), self.filter)
        left, top = round((width - self.size[1]) / 2), round((height - self.size[0]) / 2)
        return resized.crop((left, top, left + self.size[1], top + self.size[0]))

    def part(self, image: Image.Image, box: Box) -> Image.Image:
        """A part of the image, in the size that the backbone wants."""
        return self.converted(image).resize(self.size[::-1], self.filter, box=box)

    def scaled(self, image: Image.Image) -> Tensor:
        """(x / 255 - mean) / std of an image that has its size already."""
        pixels = torch.from_numpy(np.array(image, dtype=np.float32))
        pixels = pixels.reshape(*self.size, len(self.mean)).permute(2, 0, 1)
        mean, std = (
            torch.tensor(t, dtype=torch.float32).view(-1, 1, 1) for t in (self.mean, self.std)
        )
        return ((pixels / 255 - mean) / std).contiguous()

    def converted(self, image: Image.Image) -> Image.Image:
        """The image in as many channels as `mean` has."""
        return image.convert(_MODES[len(self.mean)])

    @property
    def filter(self) -> Image.Resampling:
        """PIL's name of the interpolation."""
        return _INTERPOLATIONS[self.interpolation]


def _covering(height: int, width: int, least_height: int, least_width: int) -> tuple[int, int]:
    """The smallest size of the image's shape that covers the least one; rounded as timm does."""
    if least_height * width >= least_width * height:
        return least_height, int(least_height * width / height)
    return int(least_width * height / width), least_width


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise AdaptError(f"preprocessing: {name}={value!r} is not allowed: {allowed}")


def vary(
    wants: Preprocessing, image: Image.Image, how: Augmentation, key: tuple[int, int, int]
) -> Tensor:
    """One training view of an image, a pure function of the key (seed, epoch, index).

    `flip` turns half of the images left to right; `random_resized_crop` also cuts out 8 % to 100 %
    of the area at an aspect ratio of 3:4 to 4:3 (Inception's crop, arXiv 1409.4842).

    >>> wants = Preprocessing(size=(8, 8), mean=(0.5,), std=(0.5,))
    >>> noise = Image.effect_noise((32, 32), 60)
    >>> views = [vary(wants, noise, "random_resized_crop", (0, epoch, 7)) for epoch in (1, 1, 2)]
    >>> torch.equal(views[0], views[1]), torch.equal(views[0], views[2])
    (True, False)
    """
    if how == "none":
        return wants(image)
    draw = random.Random(repr(key))  # hashed with SHA-512: neighbouring keys are unrelated
    flip = draw.random() < 0.5
    whole = how == "flip"
    seen = wants.view(image) if whole else wants.part(image, _random_box(draw, *image.size))
    return wants.scaled(seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else seen)


def _random_box(draw: random.Random, width: int, height: int) -> Box:
    for _ in range(10):
        area = width * height * draw.uniform(0.08, 1.0)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if across <= width and down <= height:
            left, top = draw.uniform(0, width - across), draw.uniform(0, height - down)
            return left, top, left + across, top + down
    side = min(width, height)  # a very long image: no such part fits
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def open_image(path: Path) -> Image.Image:
    """Read an image file completely; `AdaptError` names one that cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith(("I", "F")):  # PIL would cut the bright ones off
                raise AdaptError(f"{path} has more than 8 bits a channel: convert it to 8")
            return ImageOps.exif_transpose(image)
    except AdaptError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise AdaptError(f"cannot read the image {path}: {error}") from error
