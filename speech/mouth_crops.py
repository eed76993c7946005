"""Mouth crops: reading them, the values that a network gets, and the augmentation of training.

The crops are the user's: grey pictures of the mouth at 25 Hz, cut out by a face tracker of his own
choice. The augmentation is that of the fusion module's public code (arXiv 2312.13873). Our choice:
the mean and deviation of grey values, as lip readers trained on LRS use them, and that what is
erased or masked becomes the mean.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Generator, Tensor

from ..core.errors import AdaptError

CROP: Final = 88
RATE: Final = 25  # pictures per second
MEAN, DEVIATION = 0.421, 0.165  # of grey values from 0 to 1

_ERASED = (2, 30)  # side of an erased square of the same area, in pixels
_RATIOS = (0.3, 3.3)
_MOST_MASKED = 9  # frames of each second


def read_crops(path: str | Path) -> Tensor:
    """Grey mouth crops of a file -> uint8 [f, h, w] at 25 Hz.

    .npy holds the array [f, h, w] itself, .npz the array `video` or the only one: uint8, or floats
    from 0 to 1. Other files are videos of mouth crops, read by OpenCV where that is installed; at
    another rate than 25 Hz the nearest picture in time is taken.
    Raises AdaptError, one line that names the file, for what is missing, damaged or not such.

    >>> np.save("mouth.npy", np.zeros((50, 96, 96), np.uint8))
    >>> read_crops("mouth.npy").shape
    torch.Size([50, 96, 96])
    """
    return _as_crops(_held(Path(path)), path)


def read_film(path: str | Path) -> Tensor:
    """What a lip reader sees: mouth crops as `read_crops`, or features float32 [f, d] at 25 Hz.

    An array with two axes is features, such as AV-HuBERT's, computed by the user beforehand.
    """
    found = _held(Path(path))
    if found.ndim != 2:
        return _as_crops(found, path)
    if found.dtype.kind != "f" or 0 in found.shape or not np.isfinite(found).all():
        raise AdaptError(f"{path}: features are finite floats [f, d], not {_told(found)}")
    return torch.from_numpy(found.astype(np.float32))


def pictures_in(path: str | Path) -> int | None:
    """How many pictures an .npy file holds, by its header; None where only reading would tell."""
    path = Path(path)
    if not path.is_file():
        raise AdaptError(f"{path}: no such file of mouth crops")
    if path.suffix != ".npy":
        return None
    try:
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    except (ValueError, OSError, EOFError) as error:
        raise AdaptError(f"{path} cannot be read as an array: {_line(error)}") from error
    return int(shape[0]) if shape else 0


def _held(path: Path) -> np.ndarray[Any, Any]:
    if not path.is_file():
        raise AdaptError(f"{path}: no such file of mouth crops")
    return _array(path) if path.suffix in (".npy", ".npz") else _video(path)


def _as_crops(found: np.ndarray[Any, Any], path: str | Path) -> Tensor:
    if found.ndim != 3 or 0 in found.shape:
        raise AdaptError(f"{path} holds {list(found.shape)}: mouth crops are grey, [f, h, w]")
    if found.dtype == np.uint8:
        return torch.from_numpy(found)
    if found.dtype.kind != "f" or not (found >= 0).all() or not (found <= 1).all():
        raise AdaptError(f"{path}: grey values are uint8, or floats from 0 to 1, not {found.dtype}")
    return torch.from_numpy((found * 255).round().astype(np.uint8))


def _array(path: Path) -> np.ndarray[Any, Any]:
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            names = found.files
            if "video" not in names and len(names) != 1:
                raise AdaptError(f"{path} holds {names}: call the mouth crops 'video'")
            array: np.ndarray[Any, Any] = found["video" if "video" in names else names[0]]
            return array
    except (ValueError, OSError, EOFError) as error:
        raise AdaptError(f"{path} cannot be read as an array: {_line(error)}") from error


def _video(path: Path) -> np.ndarray[Any, Any]:
    if find_spec("cv2") is None:
        raise AdaptError(
            f"{path}: videos are read by OpenCV, which is not installed (opencv-python-headless);"
            " .npy and .npz arrays [f, h, w] need nothing"
        )
    import cv2

    film = cv2.VideoCapture(str(path))
    try:
        rate, pictures = film.get(cv2.CAP_PROP_FPS), []
        while True:
            there, picture = film.read()
            if not there:
                break
            pictures.append(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY))
    finally:
        film.release()
    if not pictures or not 0 < rate < math.inf:
        raise AdaptError(f"{path} cannot be read as a video")
    return np.stack(pictures)[at_25_hz(len(pictures), rate)]


def at_25_hz(frames: int, rate: float) -> list[int]:
    """Which pictures of a video stand for those at 25 Hz.

    >>> at_25_hz(6, 50.0), at_25_hz(3, 12.5)
    ([0, 2, 4], [0, 0, 1, 1, 2, 2])
    """
    count = round(frames * RATE / rate)
    return [min(frames - 1, int(n * rate / RATE)) for n in range(count)]


def normalised(crops: Tensor) -> Tensor:
    """uint8 [f, h, w] -> float32 [1, f, h, w] with the usual mean and deviation."""
    return ((crops.float() / 255 - MEAN) / DEVIATION).unsqueeze(0)


def centred(crops: Tensor, size: int = CROP) -> Tensor:
    """The middle [..., size, size], as for validation; smaller pictures are refused."""
    return _cut(crops, size, 0.5, 0.5)


def augmented(crops: Tensor, generator: Generator, size: int = CROP) -> Tensor:
    """One crop and one flip for the whole clip, then erased pictures and masked times.

    float32 [1, f, h, w] (`normalised`) -> [1, f, size, size].

    >>> video = normalised(torch.zeros(50, 96, 96, dtype=torch.uint8))
    >>> augmented(video, Generator().manual_seed(0)).shape
    torch.Size([1, 50, 88, 88])
    """
    y, x, flip = torch.rand(3, generator=generator).tolist()
    cut = _cut(crops, size, y, x).clone()
    cut = cut.flip(-1) if flip < 0.5 else cut
    return _masked(_erased(cut, generator), generator)


def _cut(crops: Tensor, size: int, y: float, x: float) -> Tensor:
    """The square at those shares of the room."""
    height, width = crops.shape[-2:]
    if min(height, width) < size:
        raise AdaptError(f"mouth crops of {height} x {width} pixels: at least {size} x {size}")
    top, left = (
        min(int(share * (n - size + 1)), n - size) for share, n in ((y, height), (x, width))
    )
    return crops[..., top : top + size, left : left + size]


def _erased(video: Tensor, generator: Generator) -> Tensor:
    """In half of the pictures, by chance, a rectangle of side 2 to 30, ratio 0.3 to 3.3."""
    size = video.shape[-1]
    for picture in video.unbind(1):
        chance, area, ratio, y, x = torch.rand(5, generator=generator).tolist()
        if chance < 0.5:
            side = _ERASED[0] + (_ERASED[1] - _ERASED[0]) * area
            root = math.sqrt(_RATIOS[0] * (_RATIOS[1] / _RATIOS[0]) ** ratio)
            height, width = (min(size, max(1, round(s))) for s in (side * root, side / root))
            top, left = int(y * (size - height + 1)), int(x * (size - width + 1))
            picture[..., top : top + height, left : left + width] = 0
    return video


def _masked(video: Tensor, generator: Generator) -> Tensor:
    """0 to 9 pictures of every second, side by side."""
    for start in range(0, video.shape[1], RATE):
        length = int(torch.randint(_MOST_MASKED + 1, (), generator=generator))
        first = start + int(torch.randint(RATE - length + 1, (), generator=generator))
        video[:, first : first + length] = 0
    return video


def _told(found: np.ndarray[Any, Any]) -> str:
    return f"{found.dtype} {list(found.shape)}"


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
