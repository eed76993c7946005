"""Data modules: pictures with masks, divided by patient, as batches that a SAM takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...core.batches import for_test, for_training, for_validation, require_batches
from ...core.errors import AdaptError, require_word
from .changes import Augmentation, random_crop, varied
from .folders import Pair, find_pairs, refuse_shared_patients
from .masks import Picture, read_mask, read_picture
from .parts import Division
from .vessels import Vessels, vessel_picture
from .view import View

Mask = NDArray[np.uint8]


class Batch(NamedTuple):
    """What a step gets; S is the view's side.

    image: float32 [b, 3, S, S] as the model wants it; mask: float32 [b, 1, S, S] of 0 and 1, or the
    marked share of each pixel, 0 in the padding; size: int64 [b, 2], height and width before the
    view; number: int64 [b], the picture's place in its part.
    """

    image: Tensor
    mask: Tensor
    size: Tensor
    number: Tensor


@dataclass(frozen=True)
class Case:
    """A picture with its mask, read when asked for; `part` is where its data set put it."""

    name: str
    patient: str
    read: Callable[[], tuple[Picture, Mask]]
    part: str | None = None


class Pictures(Dataset[Batch]):
    """Cases as the model sees them; asked for by (epoch, position)."""

    def __init__(
        self,
        cases: Sequence[Case],
        view: View,
        augmentation: Augmentation = "none",
        crop: int | None = None,
        seed: int = 0,
        fractions: bool = False,
    ) -> None:
        self.cases = cases
        self.view = view
        self.augmentation = augmentation
        self.crop = crop
        self.seed = seed
        self.masked = view.shares if fractions else view.mask

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: int | tuple[int, int]) -> Batch:
        epoch, position = (0, key) if isinstance(key, int) else key
        picture, mask = self.cases[position].read()
        drawn = (self.seed, epoch, position)
        pixels, mask = varied(picture.pixels, mask, self.augmentation, drawn)
        if self.crop is not None:
            pixels, mask = random_crop(pixels, mask, self.crop, drawn)
        size, number = torch.tensor(mask.shape), torch.tensor(position)
        return Batch(self.view(pixels), self.masked(mask), size, number)


class SegmentationData(LightningDataModule, ABC):
    """Pictures with masks in up to three parts, divided by `seed` so that patients stay whole.

    val_share, test_share, folds, fold, images: see `Division`; augmentation: none, flip, turns or
    salt (see `varied`), and crop: random squares of so many native pixels instead of whole
    pictures, both for training only and a pure function of (seed, epoch, picture), so that a
    resumed run sees the same; num_workers: processes that prepare pictures.

    `view` is the model's: a task sets it, else set it before asking for batches; `fractions`, too:
    whether masks are shares of pixels. `window`: values of deep pictures that become black and
    white, where they are read from files.
    Raises `AdaptError` for settings out of range and what `read` refuses.
    """

    window: tuple[float, float] | None = None

    def __init__(
        self,
        *,
        batch_size: int = 2,
        val_share: float = 0.1,
        test_share: float = 0.0,
        folds: int | None = None,
        fold: int = 0,
        images: int | None = None,
        seed: int = 0,
        augmentation: Augmentation = "none",
        crop: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        require_batches(batch_size, num_workers)
        if crop is not None and crop < 1:
            raise AdaptError(f"crop={crop} is not allowed: from 1 pixel")
        require_word("augmentation", augmentation, Augmentation)
        self.division = Division(
            val_share=val_share,
            test_share=test_share,
            folds=folds,
            fold=fold,
            images=images,
            seed=seed,
        )
        self.batch_size = batch_size
        self.seed = seed
        self.augmentation: Augmentation = augmentation
        self.crop = crop
        self.num_workers = num_workers
        self.view: View | None = None
        self.fractions = False
        self._parts: dict[str, list[Case]] = {}

    @abstractmethod
    def read(self) -> list[Case]:
        """What is there, before anything is divided."""

    def setup(self, stage: str | None = None) -> None:
        if self._parts:
            return
        cases = self.read()
        patients, told = [case.patient for case in cases], [case.part for case in cases]
        indices = self.division.of(patients, told)
        self._parts = {part: [cases[i] for i in chosen] for part, chosen in indices.items()}

    def cases(self, part: str) -> list[Case]:
        """The pictures of "train", "val" or "test": a batch's `number` counts in this list."""
        return self._parts[part]

    def pictures(self, part: str) -> Pictures:
        """The pictures of a part as the model sees them."""
        if self.view is None:
            raise AdaptError("set data.view first: the backbone's View")
        shown = partial(Pictures, self.cases(part), self.view, fractions=self.fractions)
        if part != "train":
            return shown()
        return shown(augmentation=self.augmentation, crop=self.crop, seed=self.seed)

    def train_dataloader(self) -> DataLoader[Any]:
        return for_training(self, self.pictures("train"))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return for_validation(self, self.pictures("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        return for_test(self, self.pictures("test"))


class SegmentationFolders(SegmentationData):
    """Picture and mask files in a folder or a .zip: the layouts of `find_pairs`.

    labels: the mask values that count, where masks mark several structures; window: values of deep
    pictures that become black and white, see `read_picture`; val_patients and test_patients: the
    patients of these parts by name, of whom each must be there.
    """

    def __init__(
        self,
        root: str,
        mask_suffix: str = "",
        patient: str | None = None,
        split_file: str | None = None,
        labels: tuple[int, ...] = (),
        window: tuple[float, float] | None = None,
        val_patients: tuple[str, ...] = (),
        test_patients: tuple[str, ...] = (),
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.root = root
        self.mask_suffix = mask_suffix
        self.patient = patient
        self.split_file = split_file
        self.labels = tuple(labels)
        self.window = window
        self.named = {"val": tuple(val_patients), "test": tuple(test_patients)}

    def setup(self, stage: str | None = None) -> None:
        """Before a training each picture is read with its mask, so that a bad one stops no run."""
        super().setup(stage)
        if stage == "fit":
            marked = {
                part: [bool(case.read()[1].any()) for case in self.cases(part)]
                for part in ("train", "val", "test")
            }
            if not any(marked["train"]):
                raise AdaptError(
                    f"{self.root}: none of the {len(marked['train'])} masks for training marks"
                    f" anything (labels: {list(self.labels) or 'all'})"
                )

    def read(self) -> list[Case]:
        pairs = find_pairs(self.root, self.mask_suffix, self.patient, self.split_file)
        return [self._case(pair) for pair in _in_named_parts(pairs, self.named)]

    def _case(self, pair: Pair) -> Case:
        read = partial(_read, pair, self.window, self.labels)
        return Case(pair.name, pair.patient, read, pair.part)


def _read(
    pair: Pair, window: tuple[float, float] | None, labels: tuple[int, ...]
) -> tuple[Picture, Mask]:
    picture = read_picture(pair.picture, window)
    return picture, read_mask(pair.mask, picture, labels)


def _in_named_parts(pairs: list[Pair], named: dict[str, tuple[str, ...]]) -> list[Pair]:
    if not any(named.values()):
        return pairs
    parts: dict[str, str] = {}
    for part, patients in named.items():
        for patient in patients:
            if parts.setdefault(patient, part) != part:
                raise AdaptError(f"patient {patient!r} is in two parts: {parts[patient]}, {part}")
    unknown = sorted(set(parts) - {pair.patient for pair in pairs})
    if unknown:
        raise AdaptError(f"there is no picture of patient {unknown[0]!r}, who is to be a part")
    moved = [replace(pair, part=parts.get(pair.patient, pair.part)) for pair in pairs]
    refuse_shared_patients(moved)
    return moved


class ChaseDB1(SegmentationFolders):
    """CHASE_DB1 (Fraz et al. 2012): both eyes of children, vessels by the first observer.

    The folder or .zip as it is published: Image_01L.jpg, Image_01L_1stHO.png, ... The split is ours
    and fixed: the last three patients for the test, the one before for validation, so that of the
    20 pictures of the first ten patients 12 are for training, 2 and 6 (28 pictures: 20, 2 and 6).
    """

    def __init__(self, root: str, **common: Any) -> None:
        super().__init__(root, "_1stHO", r"Image_(\d+)[LR]", **common)
        if self.split_file is not None or any(self.named.values()):
            raise AdaptError(
                "the parts of ChaseDB1 are fixed: for others take SegmentationFolders with"
                " mask_suffix '_1stHO'"
            )

    def read(self) -> list[Case]:
        cases = super().read()
        patients = sorted({case.patient for case in cases})
        if len(patients) < 5:
            raise AdaptError(
                f"{self.root} has {len(patients)} patients: at least 5 are to be split"
            )
        parts = dict.fromkeys(patients[-3:], "test") | {patients[-4]: "val"}
        return [replace(case, part=parts.get(case.patient, "train")) for case in cases]


class GeneratedVessels(SegmentationData):
    """Vessel trees by seed: train, val and test pictures of height x width, with exact masks.

    vessels: how they grow and look. Picture i is tree number 1,000,000 * trees + i, so that no
    picture is in two parts or under two values of `trees`; `seed` orders them alone.

    >>> data = GeneratedVessels(train=3, val=1, test=2, height=32, width=48)
    >>> data.setup()
    >>> data.view = View.sam(64)
    >>> batch = next(iter(data.val_dataloader()))
    >>> [list(tensor.shape) for tensor in batch], batch.size.tolist()
    ([[1, 3, 64, 64], [1, 1, 64, 64], [1, 2], [1]], [[32, 48]])
    """

    def __init__(
        self,
        train: int = 20,
        val: int = 4,
        test: int = 8,
        height: int = 256,
        width: int = 256,
        trees: int = 0,
        vessels: Vessels | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if train < 1 or min(val, test, trees) < 0:
            raise AdaptError(f"train={train}, val={val}, test={test}, trees={trees}: from 1 and 0")
        self.counts = {"train": train, "val": val, "test": test}
        self.shape = height, width
        self.trees = trees
        self.vessels = vessels or Vessels()

    def read(self) -> list[Case]:
        parts = [part for part, count in self.counts.items() for _ in range(count)]
        first = self.trees * 1_000_000
        return [
            Case(
                f"tree_{i:04}", f"{i}", partial(_drawn, first + i, *self.shape, self.vessels), part
            )
            for i, part in enumerate(parts)
        ]


# Drawing a tree takes longer than reading a file, and every epoch asks for it.
@lru_cache(maxsize=64)
def _drawn(tree: int, height: int, width: int, how: Vessels) -> tuple[Picture, Mask]:
    picture, mask = vessel_picture(tree, height, width, how)
    pixels = (picture * 255).round().astype(np.uint8)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    return Picture(pixels), mask
