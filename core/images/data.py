"""Data modules: labelled images, split and reduced by seed, as batches that a backbone takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from ..batches import for_test, for_training, for_validation, require_batches
from ..errors import AdaptError, require_word
from .lists import read_lists
from .preprocessing import Augmentation, Preprocessing, vary
from .sources import (
    OnUnreadable,
    Source,
    Sources,
    read_arrays,
    read_folders,
    read_torchvision,
    require_known,
)
from .subsets import few_per_class, split_off


class Images(Dataset[tuple[Tensor, int]]):
    """Chosen images of a source, ready for the backbone; asked for by (epoch, position)."""

    def __init__(
        self,
        source: Source,
        indices: Sequence[int],
        wants: Preprocessing,
        augmentation: Augmentation = "none",
        seed: int = 0,
    ) -> None:
        self.source = source
        self.indices = indices
        self.wants = wants
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, position = (0, key) if isinstance(key, int) else key
        index = self.indices[position]
        image = self.source.image(index)
        seen = vary(self.wants, image, self.augmentation, (self.seed, epoch, index))
        return seen, self.source.labels[index]


class Numbered(Dataset[tuple[Tensor, int, int]]):
    """Images, each with its number: the first one's is `first`."""

    def __init__(self, images: Images, first: int) -> None:
        self.images = images
        self.first = first

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int, int]:
        position = key if isinstance(key, int) else key[1]
        return *self.images[key], self.first + position


class ImageData(LightningDataModule, ABC):
    """Images in up to three parts, split and reduced by `seed`.

    val_share: of the training images, split off for validation where there is no such part;
    test_share: likewise for the test, before that (0 keeps all images for training);
    shots: keep so many training images of every class, None keeps all. Validation images do not
    count among them; augmentation: none, flip or random_resized_crop (with flip), for training only
    and a pure function of (seed, epoch, image), so that a resumed run sees the same;
    num_workers: processes that prepare images, 0 does it in between the steps.

    `preprocessing` is the backbone's: a task sets it, else set it before asking for batches.
    Raises `AdaptError` for settings out of range, fewer than two classes and what `read` refuses.
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        val_share: float = 0.1,
        test_share: float = 0.0,
        shots: int | None = None,
        seed: int = 0,
        augmentation: Augmentation = "none",
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        require_batches(batch_size, num_workers)
        require_word("augmentation", augmentation, Augmentation)
        self.batch_size = batch_size
        self.val_share = val_share
        self.test_share = test_share
        self.shots = shots
        self.seed = seed
        self.augmentation: Augmentation = augmentation
        self.num_workers = num_workers
        self.preprocessing: Preprocessing | None = None
        self.numbered = False  # whether batches for training and validation bring their numbers
        self.classes: tuple[str, ...] = ()
        self._parts: dict[str, tuple[Source, list[int]]] = {}

    @abstractmethod
    def read(self) -> Sources:
        """What is there, before anything is split or reduced."""

    def setup(self, stage: str | None = None) -> None:
        if self._parts:
            return
        sources = self.read()
        labels = sources.train.labels
        if len(set(labels)) < 2:
            raise AdaptError(
                f"all {len(labels)} training images are of one class,"
                f" {sources.classes[labels[0]]!r}: a classifier needs at least two"
            )
        self._parts = self._divided(sources)
        self.classes = sources.classes

    def _divided(self, sources: Sources) -> dict[str, tuple[Source, list[int]]]:
        labels, left = sources.train.labels, list(range(len(sources.train.labels)))
        parts = {}
        # Two seeds: else the two splits would follow one order.
        for part, source, share, seed in (
            ("test", sources.test, self.test_share, 2 * self.seed + 1),
            ("val", sources.val, self.val_share, 2 * self.seed),
        ):
            if source is None:
                left, off = split_off(labels, left, share, seed)
                parts[part] = sources.train, off
            else:
                parts[part] = source, list(range(len(source.labels)))
        if self.shots is not None:
            left = few_per_class(labels, left, self.shots, self.seed)
        if not left:
            raise AdaptError(f"no image is left for training of {len(labels)}: lower the shares")
        return {"train": (sources.train, left), **parts}

    def images(self, part: str) -> Images:
        """The images of "train", "val" or "test", as the backbone gets them."""
        if self.preprocessing is None:
            raise AdaptError("set data.preprocessing first: Preprocessing.of(backbone)")
        source, indices = self._parts[part]
        how = self.augmentation if part == "train" else "none"
        return Images(source, indices, self.preprocessing, how, self.seed)

    def numbered_images(self) -> ConcatDataset[tuple[Tensor, int, int]]:
        """The training images and then the validation images, in order, numbered from 0."""
        train = self.images("train")
        val = Numbered(self.images("val"), first=len(train))
        return ConcatDataset([Numbered(train, first=0), val])

    def _batched(self, part: str) -> Images | Numbered:
        images = self.images(part)
        if not self.numbered:
            return images
        return Numbered(images, first=0 if part == "train" else len(self.images("train")))

    def train_dataloader(self) -> DataLoader[Any]:
        return for_training(self, self._batched("train"))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return for_validation(self, self._batched("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        return for_test(self, self.images("test"))


class ImageFolders(ImageData):
    """Image files in root/train/<class>/, with val/ and test/ beside train/, or in root/<class>/.

    `on_unreadable`: "error" stops at a file that cannot be read and names it; "skip" reads all
    files once at the start and leaves those out, with a warning that counts and names them.
    """

    def __init__(self, root: str, on_unreadable: OnUnreadable = "error", **common: Any) -> None:
        super().__init__(**common)
        self.root = root
        self.on_unreadable: OnUnreadable = on_unreadable

    def read(self) -> Sources:
        return read_folders(self.root, self.on_unreadable)


class ImageLists(ImageData):
    """Image files named in lists: a file of lines "path label", labels from 0, for each part.

    The paths begin at `root`, where the lists lie. Most code for VTAB-1k has a folder per task in
    this form: to tune, train: train800.txt and val: val200.txt; for the result, train:
    train800val200.txt (the default) with val_share: 0.
    `classes` is their number, which a list with few images may not show.
    """

    def __init__(
        self,
        root: str,
        train: str = "train800val200.txt",
        val: str | None = None,
        test: str | None = "test.txt",
        classes: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.root = root
        self.lists = {"train": train, "val": val, "test": test}
        self.number = classes

    def read(self) -> Sources:
        return read_lists(self.root, self.lists, self.number)


class ArrayData(ImageData):
    """Arrays train_images, train_labels, and those of val and test and `classes`, in one .npz file.

    >>> import numpy as np
    >>> grey = np.zeros((20, 8, 8), dtype=np.uint8)
    >>> np.savez("tiny.npz", train_images=grey, train_labels=np.arange(20) % 2)
    >>> data = ArrayData("tiny.npz", val_share=0.2)
    >>> data.setup()
    >>> data.preprocessing = Preprocessing(size=(8, 8), mean=(0.5,), std=(0.5,))
    >>> len(data.images("train")), len(data.images("val")), data.classes
    (16, 4, ('0', '1'))
    """

    def __init__(self, path: str, **common: Any) -> None:
        super().__init__(**common)
        self.path = path

    def read(self) -> Sources:
        return read_arrays(self.path)


class TorchvisionData(ImageData):
    """A data set of torchvision by name, fetched to `root` when it is not there yet.

    CIFAR10, CIFAR100, SVHN, OxfordIIITPet, Food101, Flowers102, FGVCAircraft, DTD, EuroSAT, GTSRB,
    STL10, MNIST, FashionMNIST, KMNIST, RenderedSST2, Country211, Caltech101 or SUN397; its own
    validation and test part where it has one (EuroSAT, Caltech101 and SUN397 need a test_share).
    """

    def __init__(self, name: str, root: str = "data", download: bool = True, **common: Any) -> None:
        super().__init__(**common)
        require_known(name)
        self.name_ = name
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        if self.download:
            read_torchvision(self.name_, self.root, download=True)

    def read(self) -> Sources:
        return read_torchvision(self.name_, self.root, download=False)
