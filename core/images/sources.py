"""Labelled images where they come from: folders, arrays in a file, torchvision's data sets."""

from __future__ import annotations

import difflib
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ..errors import AdaptError
from .preprocessing import open_image

OnUnreadable = Literal["error", "skip"]
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Source:
    """Labels of images and how to get an image by its index (in a worker process, too)."""

    labels: Sequence[int]
    image: Callable[[int], Image.Image]


@dataclass(frozen=True)
class Sources:
    """Class names and what is there of the three parts; what is not is split off by seed."""

    classes: tuple[str, ...]
    train: Source
    val: Source | None = None
    test: Source | None = None


# Folders: one sub-folder per class, in train/, val/, test/ or right away


def read_folders(root: str, on_unreadable: OnUnreadable = "error") -> Sources:
    """Images in root/train/<class>/, and val/ and test/ if present; or in root/<class>/."""
    top = Path(root)
    if not top.is_dir():
        raise AdaptError(f"there is no folder {top}")
    first = top / "train" if (top / "train").is_dir() else top
    classes = tuple(folder.name for folder in _subfolders(first))
    if not classes:
        raise AdaptError(f"{first} has no sub-folders: one per class, with its images, is wanted")
    if first == top:
        return Sources(classes, _folder(top, classes, on_unreadable))
    rest = [_first_of(top, "val", "valid", "validation"), _first_of(top, "test")]
    val, test = (f if f is None else _folder(f, classes, on_unreadable) for f in rest)
    return Sources(classes, _folder(first, classes, on_unreadable), val, test)


def _first_of(top: Path, *names: str) -> Path | None:
    return next((top / name for name in names if (top / name).is_dir()), None)


def _folder(top: Path, classes: Sequence[str], on_unreadable: OnUnreadable) -> Source:
    for folder in _subfolders(top):
        if folder.name not in classes:
            raise AdaptError(f"{folder} is a class without training images; classes: {classes}")
    files = [(f, label) for label, name in enumerate(classes) for f in images_in(top / name)]
    if on_unreadable == "skip":
        files = _readable(files)
    if not files:
        raise AdaptError(f"{top} holds no image ({', '.join(sorted(SUFFIXES))})")
    return Source([label for _, label in files], partial(_open, [file for file, _ in files]))


def _open(files: Sequence[Path], index: int) -> Image.Image:
    return open_image(files[index])


def images_in(folder: Path) -> list[Path]:
    """Image files anywhere in a folder, in order; empty when there is no such folder."""
    found = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    return [f for f in found if f.is_file() and not f.name.startswith(".")]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _readable(files: Sequence[tuple[Path, int]]) -> list[tuple[Path, int]]:
    """Those that can be read; a warning counts and names the others."""
    good, bad = [], []
    for file, label in files:
        try:
            open_image(file)
            good.append((file, label))
        except AdaptError:
            bad.append(str(file))
    if bad:
        warnings.warn(
            f"skipped {len(bad)} of {len(files)} images, which cannot be read: {', '.join(bad)}",
            stacklevel=2,
        )
    return good


# Arrays


def read_arrays(path: str) -> Sources:
    """`train_images` uint8 [n, h, w], [n, h, w, 1] or [n, h, w, 3] and `train_labels` of an .npz.

    `val_...` and `test_...` are used if present, as are the names in `classes`.
    """
    arrays = _arrays(Path(path))
    parts = {part: _part(arrays, part, path) for part in ("train", "val", "test")}
    if parts["train"] is None:
        raise AdaptError(f"{path} has no train_images; it has {', '.join(arrays) or 'nothing'}")
    most = max(max(source.labels) for source in parts.values() if source is not None)
    classes = tuple(str(name) for name in arrays.get("classes", range(most + 1)))
    if most >= len(classes):
        raise AdaptError(f"{path}: a label is {most}, but there are {len(classes)} classes")
    return Sources(classes, parts["train"], parts["val"], parts["test"])


def _arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    if not path.is_file():
        raise AdaptError(f"there is no file {path}")
    try:
        # Opened here, because NumPy leaves a file that is no archive open.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (AttributeError, EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise AdaptError(f"{path} is not a whole .npz file of plain arrays: {error}") from error


def _part(arrays: Mapping[str, np.ndarray[Any, Any]], part: str, path: str) -> Source | None:
    if f"{part}_images" not in arrays:
        return None
    images, labels = arrays[f"{part}_images"], arrays.get(f"{part}_labels")
    if labels is None:
        raise AdaptError(f"{path} has {part}_images without {part}_labels")
    try:
        return array_source(images, labels)
    except AdaptError as error:
        raise AdaptError(f"{path}, {part}: {error}") from error


def array_source(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Source:
    """Images and labels in memory, checked.

    >>> source = array_source(np.zeros((2, 8, 8), dtype=np.uint8), np.array([1, 0]))
    >>> source.labels, source.image(0).size
    ([1, 0], (8, 8))
    """
    plain = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (1, 3))
    if images.dtype != np.uint8 or not plain:
        raise AdaptError(
            f"images are {images.dtype} {list(images.shape)}; wanted are uint8 [n, h, w],"
            " [n, h, w, 1] or [n, h, w, 3]"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or len(labels) == 0:
        raise AdaptError(
            f"labels are {labels.dtype} {list(labels.shape)} for {len(images)} images; wanted is"
            " one whole number each"
        )
    if labels.min() < 0:
        raise AdaptError(f"a label is {labels.min()}: labels count from 0")
    if images.shape[-1] == 1 and images.ndim == 4:
        images = images[..., 0]
    return Source(labels.tolist(), partial(_from_array, images))


def _from_array(images: np.ndarray[Any, Any], index: int) -> Image.Image:
    return Image.fromarray(images[index])


# torchvision's data sets

_Arguments = Mapping[str, Any] | None
_TRAIN_OR_NOT: tuple[_Arguments, ...] = ({"train": True}, None, {"train": False})
_TRAIN_TEST: tuple[_Arguments, ...] = ({"split": "train"}, None, {"split": "test"})
_TRAIN_VAL_TEST: tuple[_Arguments, ...] = tuple(
    {"split": part} for part in ("train", "val", "test")
)
_ALL_IN_ONE: tuple[_Arguments, ...] = ({}, None, None)

TORCHVISION: dict[str, tuple[_Arguments, ...]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST"), _TRAIN_OR_NOT),
    **dict.fromkeys(("SVHN", "STL10", "Food101", "GTSRB"), _TRAIN_TEST),
    **dict.fromkeys(("Flowers102", "FGVCAircraft", "DTD", "RenderedSST2"), _TRAIN_VAL_TEST),
    **dict.fromkeys(("EuroSAT", "Caltech101", "SUN397"), _ALL_IN_ONE),
    "OxfordIIITPet": ({"split": "trainval"}, None, {"split": "test"}),
    "Country211": ({"split": "train"}, {"split": "valid"}, {"split": "test"}),
}
"""Data set -> the arguments that select its training, validation and test part, if it has one."""


def require_known(name: str) -> None:
    """Refuse a data set that torchvision, or this list, does not have."""
    if name not in TORCHVISION:
        lowered = {known.lower(): known for known in TORCHVISION}
        near = difflib.get_close_matches(name.lower(), lowered, n=3)
        wanted = [lowered[n] for n in near] or sorted(TORCHVISION)
        raise AdaptError(f"unknown data set {name!r}; nearest: {', '.join(wanted)}")


def read_torchvision(name: str, root: str, download: bool) -> Sources:
    """A data set of torchvision by its class name there; `download` fetches what is missing."""
    require_known(name)
    made = [
        None if arguments is None else _torchvision(name, root, download, arguments)
        for arguments in TORCHVISION[name]
    ]
    train, val, test = (None if data is None else _source(data) for data in made)
    assert train is not None, "every data set has a training part"
    named = getattr(made[0], "classes", None) or getattr(made[0], "categories", None)
    labels = {label for source in (train, val, test) if source for label in source.labels}
    classes = named or [str(i) for i in range(max(labels) + 1)]
    return Sources(tuple(str(name) for name in classes), train, val, test)


def _torchvision(name: str, root: str, download: bool, arguments: Mapping[str, Any]) -> Any:
    import torchvision.datasets

    try:
        return getattr(torchvision.datasets, name)(root, download=download, **arguments)
    except (OSError, RuntimeError) as error:  # no network, a damaged archive, nothing there
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        doing = "cannot be fetched to" if download else "is not whole in"
        raise AdaptError(f"the data set {name} {doing} {root}: {cause}") from error


def _source(data: Any) -> Source:
    return Source(_labels(data), partial(_first, data))


def _first(data: Any, index: int) -> Image.Image:
    image: Image.Image = data[index][0]
    return image


def _labels(data: Any) -> list[int]:
    """torchvision has no one name for labels, and reading every image for them takes minutes."""
    for name in ("targets", "labels", "_labels", "y"):
        if hasattr(data, name):
            return [int(label) for label in getattr(data, name)]
    return [int(label) for _, label in data._samples]
