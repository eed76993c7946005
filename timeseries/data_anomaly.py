"""Data modules for anomalies: what is normal to train on, and a labelled stretch to test on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.batches import for_training, in_order
from ..core.errors import AdaptError
from ..core.order import EpochSampler
from .frames import numbers, read_frame
from .gaps import Missing, filled
from .scaling import Scaler
from .series import Values
from .windows import as_it_is


class Stretches(Dataset[tuple[Tensor, ...]]):
    """Windows of `length` rows from given starts: (x [L, C],), or (x, labels [L]).

    With labels [rows] come those of the window, -1 for a row that the window before has.

    >>> rows = torch.arange(5.0)[:, None]
    >>> Stretches(rows, [0, 3], length=2).__getitems__([1])[0].flatten().tolist()
    [3.0, 4.0]
    """

    def __init__(
        self, values: Tensor, starts: Sequence[int], length: int, labels: Tensor | None = None
    ) -> None:
        self.values = values
        self.starts = torch.as_tensor(starts)
        self.length = length
        self.labels = labels
        ends = self.starts + length - 1
        self.seen = torch.cat(
            [ends.new_full((1,), -1), ends[:-1]]
        )  # the last row of the one before

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, position: int) -> tuple[Tensor, ...]:
        return tuple(part[0] for part in self.__getitems__([position]))

    def __getitems__(self, positions: Sequence[int]) -> tuple[Tensor, ...]:
        """A whole batch at once, for a DataLoader with `as_it_is`: (x [b, L, C], labels [b, L])."""
        places = torch.as_tensor(positions)
        rows = self.starts[places][:, None] + torch.arange(self.length)
        x = self.values[rows]
        if self.labels is None:
            return (x,)
        return x, self.labels[rows].where(rows > self.seen[places][:, None], -1)


class AnomalyTable(LightningDataModule):
    """A table that is taken for normal, another one to find anomalies in, and its labels.

    train, test: .csv, .parquet or .npy [rows, C]; labels: the name of a column of 0 and 1 in the
    test table (left out of both tables), or a file of one column with as many rows; without: other
    columns that are no channels, such as the time; missing: see `gaps.filled`; step: from one
    training window to the next. The last `val_share` of the training rows validate, the scaler is
    measured on the rows before.

    `look_back` is the length of a window (100 in the usual code); a task sets it. Training and
    validation batches are (x [b, L, C],), the test's (x, labels [b, L]): 1 an anomaly, 0 none.
    Test windows follow each other and all rows are in one. The last begins earlier, so that it
    is whole: those of its rows that the window before has are labelled -1 and do not count. The
    others are the rows, each once, in order. (The usual code drops the last rows.)
    """

    def __init__(
        self,
        train: str,
        test: str,
        labels: str,
        *,
        without: Sequence[str] = (),
        missing: Missing = "refuse",
        step: int = 1,
        val_share: float = 0.2,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if step < 1 or batch_size < 1 or num_workers < 0:
            raise AdaptError(
                f"step={step}, batch_size={batch_size}, num_workers={num_workers}:"
                " from 1, from 1 and from 0"
            )
        if not 0 <= val_share < 1:
            raise AdaptError(f"val_share={val_share:g} is not allowed: from 0, below 1")
        self.files = {"train": train, "test": test}
        self.labels = labels
        self.without = tuple(without)
        self.missing: Missing = missing
        self.step = step
        self.val_share = val_share
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.look_back = 100
        self.names: tuple[str, ...] = ()
        self.scaler: Scaler | None = None
        self._rows: dict[str, Tensor] = {}

    def setup(self, stage: str | None = None) -> None:
        if self._rows:
            return
        test, others = self._table("test")
        self._labels = self._read_labels(len(test))
        train, names = self._table("train")
        if names != others:
            raise AdaptError(
                f"{self.files['test']} has the channels {', '.join(others)},"
                f" {self.files['train']} has {', '.join(names)}"
            )
        kept = len(train) - int(len(train) * self.val_share)
        self.names, self.scaler = names, Scaler.of(train[:kept])
        parts = {"train": train[:kept], "val": train[kept:], "test": test}
        for part, values in parts.items():
            self._rows[part] = torch.from_numpy(self.scaler.apply(values)).float()

    def stretches(self, part: str) -> Stretches:
        """The windows of "train", "val" or "test"."""
        if not self._rows:
            raise AdaptError("the tables are not read yet: call setup() first")
        values, length = self._rows[part], self.look_back
        if len(values) < length:
            raise AdaptError(f"the {part} part has {len(values)} rows, a window has {length}")
        if part == "train":
            return Stretches(values, range(0, len(values) - length + 1, self.step), length)
        starts = tiled(len(values), length)
        if part == "val":
            return Stretches(values, starts, length)
        return Stretches(values, starts, length, self._labels)

    def train_dataloader(self) -> DataLoader[Any]:
        windows = self.stretches("train")
        order = EpochSampler(len(windows), self.seed)
        return for_training(self, windows, order, collate_fn=as_it_is)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if self._rows and not len(self._rows["val"]):
            return []
        return in_order(self, self.stretches("val"), collate_fn=as_it_is)

    def test_dataloader(self) -> DataLoader[Any]:
        return in_order(self, self.stretches("test"), collate_fn=as_it_is)

    def _table(self, part: str) -> tuple[Values, tuple[str, ...]]:
        path = self.files[part]
        if path.endswith(".npy"):
            values = _array(path)
            names = tuple(f"channel {number}" for number in range(values.shape[1]))
        else:
            frame = read_frame(path)
            left_out = {*self.without, self.labels}
            names = tuple(name for name in frame.columns if name not in left_out)
            if not names:
                raise AdaptError(f"{path}: no column is left as a channel")
            read = [
                numbers(frame[name], f"{path}, column {name!r}", f"without=[{name}] leaves it out")
                for name in names
            ]
            values = np.stack(read, axis=1)
        return filled(values, names, self.missing, whose=path), names

    def _read_labels(self, rows: int) -> Tensor:
        path = self.labels if Path(self.labels).is_file() else self.files["test"]
        if path.endswith(".npy"):
            labels = _array(path)[:, 0]
        else:
            frame = read_frame(path)
            name = self.labels if path == self.files["test"] else frame.columns[-1]
            if name not in frame.columns:
                raise AdaptError(
                    f"labels={self.labels!r} is neither a file nor a column of {path}:"
                    f" {', '.join(frame.columns)}"
                )
            labels = numbers(frame[name], f"{path}, column {name!r}")
        if len(labels) != rows:
            raise AdaptError(f"{path} has {len(labels)} labels, the test has {rows} rows")
        if wrong := sorted({*labels.tolist()} - {0.0, 1.0}):
            raise AdaptError(f"{path} has the label {wrong[0]:g}: 1 is an anomaly, 0 is none")
        return torch.from_numpy(labels).long()


def tiled(rows: int, length: int) -> list[int]:
    """Starts of windows that follow each other and hold all rows; the last may begin earlier.

    >>> tiled(10, 4), tiled(8, 4)
    ([0, 4, 6], [0, 4])
    """
    starts = list(range(0, rows - length + 1, length))
    return starts if rows % length == 0 else [*starts, rows - length]


def _array(path: str) -> Values:
    """A .npy file as float64 [rows, C]."""
    try:
        values = np.load(path, allow_pickle=False)
        values = values.astype(np.float64).reshape(len(values), -1)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise AdaptError(f"{path} cannot be read as an array: {error}") from error
    if not values.size:
        raise AdaptError(f"{path} has no value")
    array: Values = values
    return array
