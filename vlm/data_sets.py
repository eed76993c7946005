"""The eleven data sets of CoOp's few-shot protocol by name, as a user has them on disk."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import AdaptError
from ..core.images.data import ImageData
from ..core.images.sources import (
    Source,
    Sources,
    images_in,
    read_folders,
    read_torchvision,
)
from .coop import (
    Fewer,
    Half,
    Row,
    few_shot,
    half_of,
    listed,
    picked,
    read_split,
    split_by_seed,
)


@dataclass(frozen=True)
class DataSet:
    """Where a data set lies below its root, and what CoOp's table counts in it."""

    folder: str
    images: str
    """The folder of images inside `folder`."""
    classes: int
    test_images: int
    published: str | None = None
    """The word that CoOp calls its split file by."""
    torchvision: str | None = None
    """torchvision's name of it, whose own files serve where there is no split file."""
    renamed: Mapping[str, str | None] = field(default_factory=dict)
    """Folder -> class name, where the split file has another one; None: it leaves that out."""

    @property
    def split(self) -> str | None:
        """The split file, inside `folder`."""
        return self.published and f"split_zhou_{self.published}.json"


_EUROSAT = {
    "AnnualCrop": "Annual Crop Land",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}
_CALTECH = {
    "BACKGROUND_Google": None,
    "Faces_easy": None,
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
}

DATA_SETS: Mapping[str, DataSet] = {
    "imagenet": DataSet("imagenet", "images", 1000, 50000),
    "sun397": DataSet("sun397", "SUN397", 397, 19850, "SUN397", "SUN397"),
    "fgvc_aircraft": DataSet("fgvc_aircraft", "images", 100, 3333),
    "eurosat": DataSet("eurosat", "2750", 10, 8100, "EuroSAT", renamed=_EUROSAT),
    "stanford_cars": DataSet("stanford_cars", ".", 196, 8041, "StanfordCars"),
    "food101": DataSet("food-101", "images", 101, 30300, "Food101"),
    "oxford_pets": DataSet("oxford_pets", "images", 37, 3669, "OxfordPets", "OxfordIIITPet"),
    "oxford_flowers": DataSet("oxford_flowers", "jpg", 102, 2463, "OxfordFlowers", "Flowers102"),
    "caltech101": DataSet(
        "caltech-101", "101_ObjectCategories", 100, 2465, "Caltech101", renamed=_CALTECH
    ),
    "dtd": DataSet("dtd", "images", 47, 1692, "DescribableTextures"),
    "ucf101": DataSet("ucf101", "UCF-101-midframes", 101, 3783, "UCF101"),
}
"""Folders as CoOp's instructions name them; keys are those of `prompts.TEMPLATES`."""


class CoOpData(ImageData):
    """K images of every class of one of the eleven data sets, and its test part.

    name: a key of `DATA_SETS`; root: the folder that holds `DATA_SETS[name].folder`, laid out as
    CoOp's instructions say. Where the published split file (or, for Aircraft and ImageNet, the data
    set's own parts) is, it decides; else class folders are split 50/20/30 by `split_seed`, so that
    every seed of shots has one test part, or torchvision's files below `root` are read, with a
    warning either way: such numbers compare with no published ones.
    shots: images of every class, None keeps the whole training part; drawn by `seed`; fewer:
    "repeat" uses images of a class that has not so many more than once, "refuse" stops there.
    half: "base" or "new" keeps that half of the classes (CoCoOp, arXiv 2203.05557).

    Further settings are those of `ImageData`. Raises `AdaptError` for an unknown name and what is
    not there; counts other than the published ones bring a warning.
    """

    def __init__(
        self,
        name: str,
        root: str,
        shots: int | None = None,
        fewer: Fewer = "repeat",
        half: Half = "all",
        split_seed: int = 1,
        **common: Any,
    ) -> None:
        super().__init__(shots=shots, **common)
        if name not in DATA_SETS:
            near = difflib.get_close_matches(name, DATA_SETS, n=1, cutoff=0.3)
            raise AdaptError(
                f"unknown data set {name!r}"
                + (f"; nearest: {near[0]}" if near else "")
                + f"; there are {', '.join(DATA_SETS)}"
            )
        self.name_ = name
        self.root = root
        self.fewer: Fewer = fewer
        self.half: Half = half
        self.split_seed = split_seed

    def read(self) -> Sources:
        whole = read_data_set(self.name_, Path(self.root), self.split_seed)
        kept = half_of(whole, self.half)
        return kept if self.shots is None else few_shot(kept, self.shots, self.seed, self.fewer)


def read_data_set(name: str, root: Path, seed: int = 1) -> Sources:
    """All images of one of the eleven, in their parts; see `CoOpData`."""
    known = DATA_SETS[name]
    folder = root / known.folder
    if name == "imagenet":
        sources = _imagenet(folder)
    elif name == "fgvc_aircraft":
        sources = _aircraft(folder)
    elif known.split is not None and (folder / known.split).is_file():
        sources = read_split(folder / known.split, folder / known.images)
    else:
        warnings.warn(
            f"{name}: there is no {folder / str(known.split)}, so the parts are not the published"
            " ones, and neither are the numbers",
            stacklevel=2,
        )
        return _without_split(name, root, seed)
    _tell_other_counts(name, sources)
    return sources


def _tell_other_counts(name: str, sources: Sources) -> None:
    known, found = DATA_SETS[name], len(sources.test.labels) if sources.test else 0
    if (len(sources.classes), found) != (known.classes, known.test_images):
        warnings.warn(
            f"{name} has {len(sources.classes)} classes and {found} test images here, "
            f"{known.classes} and {known.test_images} in the published table",
            stacklevel=3,
        )


def _without_split(name: str, root: Path, seed: int) -> Sources:
    known = DATA_SETS[name]
    images = root / known.folder / known.images
    if known.torchvision is not None:
        return read_torchvision(known.torchvision, str(root), download=False)
    if known.images == "." or not images.is_dir():
        wanted = f"{images / 'CLASS' / 'IMAGE'} or " if known.images != "." else ""
        raise AdaptError(f"{name}: there is neither {wanted}{root / known.folder}/{known.split}")
    found = read_folders(str(images))
    called = [known.renamed.get(name, name) for name in found.classes]
    keep = [label for label, name in enumerate(called) if name is not None]
    indices = [i for i, label in enumerate(found.train.labels) if label in set(keep)]
    some = picked(found.train, indices)
    source = Source([keep.index(label) for label in some.labels], some.image)
    return split_by_seed(tuple(filter(None, called)), source, seed)


def _aircraft(folder: Path) -> Sources:
    """`variants.txt`, and for every part lines "image variant" in `images_variant_<part>.txt`."""
    variants = _lines(folder / "variants.txt")
    number = {name: label for label, name in enumerate(variants)}
    rows: dict[str, list[Row]] = {}
    for part in ("train", "val", "test"):
        file = folder / f"images_variant_{part}.txt"
        rows[part] = []
        for line in _lines(file):
            image, _, variant = line.partition(" ")
            if variant not in number:
                raise AdaptError(f"{file}: {line!r} names no variant of {folder / 'variants.txt'}")
            rows[part].append((f"{image}.jpg", number[variant], variant))
    return listed(folder, folder / "images", rows)


def _imagenet(folder: Path) -> Sources:
    """`classnames.txt` with lines "n01440764 tench"; its validation part is the test part."""
    names = [line.partition(" ") for line in _lines(folder / "classnames.txt")]
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    for part, sub in (("train", "train"), ("test", "val")):
        top = folder / "images" / sub
        for label, (wnid, _, name) in enumerate(names):
            files = images_in(top / wnid)
            rows[part] += [(f"{f.relative_to(folder / 'images')}", label, name) for f in files]
    if not rows["train"]:
        raise AdaptError(f"imagenet: there is no image in {folder / 'images' / 'train' / 'WNID'}")
    return listed(folder, folder / "images", rows)


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AdaptError(f"cannot read {file}: {error}") from error
    return [line.strip() for line in lines if line.strip()]
