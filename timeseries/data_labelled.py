"""Data modules of classification: labelled series of the UCR and UEA archives, through aeon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from ..core.batches import for_training, for_validation, in_order, require_batches
from ..core.errors import AdaptError
from ..core.images.subsets import split_off
from ..core.order import EpochSampler
from .gaps import Missing, filled
from .scaling import Scaler
from .series import Values

Labelled = tuple[list[Values], list[str]]  # series [L, C], and the class of each by name


class UCR(LightningDataModule):
    """A set of the UCR or UEA archive by name, such as JapaneseVowels, BasicMotions or GunPoint.

    These three and a few others come with aeon. Others are read from folder/NAME/NAME_TRAIN.ts and
    _TEST.ts, and fetched to there by aeon when they are not there yet. val_share: of the training
    series, split off by `seed`, every class in proportion; scale: bring each channel to mean 0 and
    standard deviation 1, measured over all rows of the series that are trained on; missing: see
    `gaps.filled`.

    Series of unequal lengths (JapaneseVowels: 7 to 29 rows) are filled up to the longest of both
    parts by repeating their last row; the usual code repeats zeros.

    After `setup`: `classes` by name, `names` of the channels, `length`, `scaler`. Batches are
    (x [b, L, C], label [b]). A task sets `look_back`, and one that is not `length` is refused.
    """

    def __init__(
        self,
        name: str,
        folder: str = "data",
        *,
        batch_size: int = 16,
        val_share: float = 0.1,
        scale: bool = True,
        missing: Missing = "refuse",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        require_batches(batch_size, num_workers)
        self.name_ = name
        self.folder = folder
        self.batch_size = batch_size
        self.val_share = val_share
        self.scale = scale
        self.missing: Missing = missing
        self.seed = seed
        self.num_workers = num_workers
        self.look_back: int | None = None
        self.classes: tuple[str, ...] = ()
        self.names: tuple[str, ...] = ()
        self.length = 0
        self.scaler: Scaler | None = None
        self._parts: dict[str, TensorDataset] = {}

    def prepare_data(self) -> None:
        read(self.name_, self.folder)

    def setup(self, stage: str | None = None) -> None:
        if self._parts:
            return
        found, classes = read(self.name_, self.folder)
        whole = {part: self._filled(series) for part, (series, _) in found.items()}
        labels = {part: self._labels(names, classes) for part, (_, names) in found.items()}
        if len(set(labels["train"])) < 2:
            raise AdaptError(f"{self.name_}: all training series are of one class")
        self.length = max(len(one) for series in whole.values() for one in series)
        self.names = tuple(f"channel {number}" for number in range(whole["train"][0].shape[1]))
        kept, held = split_off(
            labels["train"], range(len(whole["train"])), self.val_share, self.seed
        )
        if self.scale:
            self.scaler = Scaler.of(np.concatenate([whole["train"][i] for i in kept]))
        self.classes = classes
        for part, of, places in (
            ("train", "train", kept),
            ("val", "train", held),
            ("test", "test", range(len(whole["test"]))),
        ):
            self._parts[part] = self._together(whole[of], labels[of], places)

    def part(self, part: str) -> TensorDataset:
        """The series [n, L, C] and labels [n] of "train", "val" or "test"."""
        if not self._parts:
            raise AdaptError("the series are not read yet: call setup() first")
        if self.look_back not in (None, self.length):
            raise AdaptError(
                f"look_back={self.look_back}: the series of {self.name_} have {self.length} rows"
            )
        return self._parts[part]

    def train_dataloader(self) -> DataLoader[Any]:
        series = self.part("train")
        return for_training(self, series, EpochSampler(len(series), self.seed))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return for_validation(self, self.part("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        return in_order(self, self.part("test"))

    def _filled(self, series: Sequence[Values]) -> list[Values]:
        channels = [f"channel {number}" for number in range(series[0].shape[1])]
        return [
            filled(one, channels, self.missing, whose=f"{self.name_}, series {number + 1}")
            for number, one in enumerate(series)
        ]

    def _labels(self, names: Sequence[str], classes: Sequence[str]) -> list[int]:
        place = {name: number for number, name in enumerate(classes)}
        if unknown := sorted({*names} - {*classes}):
            raise AdaptError(f"{self.name_}: no training series is of the class {unknown[0]!r}")
        return [place[name] for name in names]

    def _together(
        self, series: Sequence[Values], labels: Sequence[int], places: Sequence[int]
    ) -> TensorDataset:
        x = np.zeros((len(places), self.length, len(self.names)))
        for row, place in enumerate(places):
            one = series[place] if self.scaler is None else self.scaler.apply(series[place])
            x[row] = lengthened(one, self.length)
        y = torch.tensor([labels[place] for place in places], dtype=torch.long)
        return TensorDataset(torch.from_numpy(x).float(), y)


def lengthened(series: Values, length: int) -> Values:
    """A series [rows, C] with its last row repeated up to `length` rows.

    >>> lengthened(np.array([[1.0], [2.0]]), 4).ravel().tolist()
    [1.0, 2.0, 2.0, 2.0]
    """
    return np.concatenate([series, np.repeat(series[-1:], length - len(series), axis=0)])


def read(name: str, folder: str) -> tuple[dict[str, Labelled], tuple[str, ...]]:
    """The "train" and the "test" part of a set, and its classes in the order of its header.

    `AdaptError` if aeon neither has it nor can fetch it.
    """
    try:
        from aeon.datasets import load_classification
    except ImportError as error:
        raise AdaptError(
            "UCR and UEA sets need aeon: pip install 'polyadapt[timeseries]'"
        ) from error
    found: dict[str, Labelled] = {}
    classes: list[str] = []
    for part in ("train", "test"):
        try:
            series, names, about = load_classification(
                name, split=part, extract_path=_place(name, folder), return_metadata=True
            )
        # What a network, an archive and a parser raise; aeon's own words span lines.
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise AdaptError(
                f"aeon cannot give the {part} part of {name!r} from {folder} or its source:"
                f" {' '.join(str(error).split())[:200]}"
            ) from error
        found[part] = [np.asarray(one, dtype=np.float64).T for one in series], list(map(str, names))
        classes = classes or list(map(str, about["class_values"]))
    trained = set(found["train"][1])
    return found, tuple(classes if trained <= set(classes) else sorted(trained))


def _place(name: str, folder: str) -> str | None:
    """None for a set that comes with aeon: it looks there only if no folder is said."""
    import aeon.datasets

    shipped = Path(aeon.datasets.__file__).parent / "data" / name / f"{name}_TRAIN.ts"
    return None if shipped.is_file() else folder
