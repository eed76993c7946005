"""Recorded scenes with true poses, some with true depths: frames, loaded as views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.errors import AdaptError
from ..core.images.preprocessing import open_image
from .cameras import inverse_poses
from .pictures_in import Centre, Part, view_of
from .reconstruction import Reconstruction


@dataclass(frozen=True, eq=False)
class Frame:
    """An image with its true camera; focal and principal point in its own pixels, if known.

    A pixel's centre is at +0.5; files that count from the centres have a half less.
    """

    image: Path
    pose: Tensor  # [4, 4] fp64 camera to world, OpenCV axes
    depth: Path | None = None  # 16 bits
    focal: float | None = None
    centre: Centre | None = None


@dataclass(frozen=True, eq=False)
class Recording:
    """Frames in the order of time; depth files hold metres times `depth_scale`."""

    name: str
    frames: Sequence[Frame]
    depth_scale: float = 1.0

    def __len__(self) -> int:
        return len(self.frames)

    def load(
        self, numbers: Sequence[int], size: tuple[int, int]
    ) -> tuple[Reconstruction, list[Part]]:
        """Some frames as views of `size` (height, width), and which parts of the images they show.

        Images as in `pictures_in.view_of`; the part is the one about the principal point. Depths
        are those of the nearest pixel, 0 where there is none; focals NaN where they are not known.
        The world is the first chosen camera's frame: far from their origin, poses of 32 bits would
        be coarse.

        Raises AdaptError for files that cannot be read or do not fit each other, or no frame.
        """
        if not numbers:
            raise AdaptError(f"no frame of {self.name} is chosen: at least one is needed")
        chosen = [self.frames[number] for number in numbers]
        views = [view_of(open_image(f.image), size, f.centre) for f in chosen]
        parts = [part for _, part in views]
        depths = torch.stack(
            [self._depth(f, part, size) for f, part in zip(chosen, parts, strict=True)]
        )
        focals = [
            torch.nan if f.focal is None else f.focal * part.scale
            for f, part in zip(chosen, parts, strict=True)
        ]
        poses = torch.stack([f.pose for f in chosen])
        reference = Reconstruction(
            (inverse_poses(poses[:1]) @ poses).float(),
            torch.tensor(focals),
            depths,
            (depths > 0).float(),
            torch.stack([image for image, _ in views]),
            [f.image.name for f in chosen],
        )
        return reference, parts

    def _depth(self, frame: Frame, part: Part, size: tuple[int, int]) -> Tensor:
        if frame.depth is None:
            return torch.zeros(size)
        whole = _sixteen_bits(frame.depth)
        if whole.shape != (part.height, part.width):
            h, w = whole.shape
            raise AdaptError(
                f"{frame.depth} has {w}x{h} pixels, its image {part.width}x{part.height}"
            )
        rows = _nearest(part.top, part.scale, size[0], part.height)
        columns = _nearest(part.left, part.scale, size[1], part.width)
        return (whole[rows][:, columns] / self.depth_scale).float()


def _sixteen_bits(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            image.load()
            values = np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise AdaptError(f"cannot read the depths {path}: {error}") from error
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise AdaptError(f"{path} is no depth map: one channel of whole numbers is wanted")
    return torch.from_numpy(values.astype(np.float64))


def _nearest(begin: float, scale: float, many: int, of: int) -> Tensor:
    """Which of `of` pixels hold the centres of a view's `many` pixels."""
    centres = begin + (torch.arange(many, dtype=torch.float64) + 0.5) / scale
    return centres.floor().long().clamp(0, of - 1)


def divided(many: int, calibrating: int, testing: int) -> tuple[list[int], list[int]]:
    """Numbers of frames to calibrate on and others to test on, both all over a recording of `many`.

    calibrating + testing numbers lie evenly in it; those to test on lie evenly among these.

    Raises AdaptError where there are not so many frames.

    >>> divided(100, 4, 2)
    ([0, 40, 59, 99], [20, 79])
    """
    total = calibrating + testing
    if not 0 < total <= many or min(calibrating, testing) < 0:
        raise AdaptError(
            f"{calibrating} frames to calibrate on and {testing} to test on: there are {many}"
        )
    numbers = [round(i * (many - 1) / max(total - 1, 1)) for i in range(total)]
    test = {int((i + 0.5) * total / testing) for i in range(testing)}
    return (
        [number for i, number in enumerate(numbers) if i not in test],
        [number for i, number in enumerate(numbers) if i in test],
    )
