"""Data modules of forecasting: a scaled table, cut by its borders, as batches of windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Generator
from torch.utils.data import DataLoader, Subset

from ..core.batches import for_training, in_order
from ..core.errors import AdaptError
from ..core.order import EpochSampler
from . import borders
from .borders import Borders
from .gaps import LONGEST, Missing
from .scaling import Scaler
from .series import Series
from .tables import read_long, read_standard, read_table, side_by_side
from .windows import Window, Windows, as_it_is, every_window


class SeriesData(LightningDataModule, ABC):
    """Windows of one table in three parts that follow each other in time.

    The scaler is measured on all training rows and applied to every part; losses and metrics stay
    in scaled units. joint: a window holds all channels, else one; few: keep only the earliest
    share of the training rows (the scaler still sees all of them, as in the published protocol);
    windows_per_epoch: train on so many windows, drawn once by `seed`, the same in every epoch;
    every: validate on every so-manieth window of a channel only; num_workers: processes that cut
    batches. The test always has all windows, and no loader drops its last batch.

    `look_back` and `horizon` are the forecaster's: a task sets them, else set them before asking
    for batches (past [b, L, c], future [b, T, c], fp32, scaled). A horizon of 0 gives windows
    without a future, for imputation. After `setup`: `series`, `names`, `frequency`, `scaler` and
    `period`, the rows of a season. Raises `AdaptError` for settings out of range, for what `read`
    refuses and for a part without a window.
    """

    def __init__(
        self,
        *,
        batch_size: int = 256,
        few: float = 1.0,
        joint: bool = False,
        windows_per_epoch: int | None = None,
        every: int = 1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, number, least in (
            ("batch_size", batch_size, 1),
            ("windows_per_epoch", windows_per_epoch, 1),
            ("every", every, 1),
            ("num_workers", num_workers, 0),
        ):
            if number is not None and number < least:
                raise AdaptError(f"{name}={number} is not allowed: a whole number from {least}")
        if not 0 < few <= 1:
            raise AdaptError(f"few={few:g} is not allowed: a share above 0 and up to 1")
        self.batch_size = batch_size
        self.few = few
        self.joint = joint
        self.windows_per_epoch = windows_per_epoch
        self.every = every
        self.seed = seed
        self.num_workers = num_workers
        self.look_back: int | None = None
        self.horizon: int | None = None
        self._read: tuple[Series, Scaler] | None = None

    @abstractmethod
    def read(self) -> Series:
        """The whole table, in its own units."""

    @abstractmethod
    def cut(self, rows: int, look_back: int) -> Borders:
        """The borders of a table with so many rows."""

    def setup(self, stage: str | None = None) -> None:
        if self._read is not None:
            return
        series = self.read()
        train = self.cut(len(series), 0).train
        if not train:
            raise AdaptError(f"no row of {len(series)} is for training: the table is too short")
        self._read = series, Scaler.of(series.values[train.start : train.stop])
        self._scaled = torch.from_numpy(self.scaler.apply(series.values)).float()

    @property
    def series(self) -> Series:
        return self._known()[0]

    @property
    def scaler(self) -> Scaler:
        return self._known()[1]

    @property
    def names(self) -> tuple[str, ...]:
        return self.series.names

    @property
    def frequency(self) -> str | None:
        return self.series.frequency

    @property
    def period(self) -> int:
        return self.series.season

    def _known(self) -> tuple[Series, Scaler]:
        if self._read is None:
            raise AdaptError("the table is not read yet: call setup() first")
        return self._read

    def windows(self, part: str) -> Windows:
        """All windows of "train", "val" or "test"; `AdaptError` if there is none."""
        look_back, horizon = self._shape()
        cut = borders.few(self.cut(len(self.series), look_back), self.few, look_back)
        rows: range = getattr(cut, part)
        windows = Windows(self._scaled, rows, look_back, horizon, self.joint)
        if not len(windows):
            why = f" with few={self.few:g}" if part == "train" and self.few < 1 else ""
            raise AdaptError(
                f"the {part} part has {len(rows)} rows{why}, and a window of look_back={look_back}"
                f" and horizon={horizon} needs {look_back + horizon}"
            )
        return windows

    def _shape(self) -> tuple[int, int]:
        if self.look_back is None or self.horizon is None:
            raise AdaptError("set data.look_back and data.horizon first")
        return self.look_back, self.horizon

    def train_dataloader(self) -> DataLoader[Any]:
        windows: Windows | Subset[Window] = self.windows("train")
        wanted = self.windows_per_epoch
        if wanted is not None and wanted < len(windows):
            # A seed of its own, else the choice would be the order of the first epoch.
            own = Generator().manual_seed(2**31 + self.seed)
            drawn = torch.randperm(len(windows), generator=own)
            windows = Subset(windows, drawn[:wanted].tolist())
        order = EpochSampler(len(windows), self.seed)
        return for_training(self, windows, order, collate_fn=as_it_is)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        look_back, _ = self._shape()
        if len(self.cut(len(self.series), look_back).val) == look_back:
            return []  # no row between training and test
        windows = self.windows("val")
        if self.every == 1:
            return in_order(self, windows, collate_fn=as_it_is)
        some = Subset(windows, every_window(windows, self.every))
        return in_order(self, some, collate_fn=as_it_is)

    def test_dataloader(self) -> DataLoader[Any]:
        return in_order(self, self.windows("test"), collate_fn=as_it_is)


class ETT(SeriesData):
    """ETTh1, ETTh2, ETTm1 or ETTm2 from its CSV file, with the published borders.

    An hourly and a quarter-hourly file are told apart by the step of their times.
    """

    def __init__(self, path: str, **common: Any) -> None:
        super().__init__(**common)
        self.path = path
        self._per_hour = 1

    def read(self) -> Series:
        series = read_table(self.path, time="date")
        steps = {"h": 1, "15min": 4}
        if series.frequency not in steps:
            raise AdaptError(
                f"{self.path}: a row every {series.frequency}, ETT's are h or 15min apart;"
                " another table is read by TableData"
            )
        self._per_hour = steps[series.frequency]
        return _with_last(series, "OT")

    def cut(self, rows: int, look_back: int) -> Borders:
        return borders.ett(rows, look_back, self._per_hour)


@dataclass(frozen=True)
class Published:
    """What the benchmarks' papers say about a table: rows, channels and step."""

    rows: int
    channels: int
    frequency: str


BENCHMARKS = {
    "Weather": Published(52_696, 21, "10min"),
    "Electricity": Published(26_304, 321, "h"),
    "Traffic": Published(17_544, 862, "h"),
    "ILI": Published(966, 7, "W"),
    "Exchange": Published(7_588, 8, "D"),
}


class Benchmark(SeriesData):
    """Weather, Electricity, Traffic, ILI or Exchange from its CSV file, cut 70 : 10 : 20.

    As in the usual loader rows are the steps, whatever the `date` column says (Weather has gaps),
    and the target column `OT` comes last. A file of another size is refused: its numbers could not
    be compared with published ones (TableData reads it).
    """

    def __init__(self, name: str, path: str, **common: Any) -> None:
        super().__init__(**common)
        if name not in BENCHMARKS:
            raise AdaptError(f"there is no benchmark {name!r}: {', '.join(BENCHMARKS)}")
        self.name_ = name
        self.path = path

    def read(self) -> Series:
        published = BENCHMARKS[self.name_]
        series = read_standard(self.path, published.frequency)
        wanted = (published.rows, published.channels)
        if series.values.shape != wanted:
            raise AdaptError(
                f"{self.path}: {series.values.shape[0]} rows of {series.values.shape[1]} channels,"
                f" {self.name_} has {wanted[0]} of {wanted[1]}; another table is read by TableData"
            )
        return _with_last(series, "OT")

    def cut(self, rows: int, look_back: int) -> Borders:
        return borders.shares(rows, look_back)


class TableData(SeriesData):
    """Any CSV or Parquet table, as `tables.read_table` reads it.

    train_share and test_share of the rows; those between them validate. time: the column with the
    times; columns: the channels, None takes all; missing: refuse, interpolate or last, over runs of
    up to `longest` rows; id: the column that tells the series of a long table apart, which then are
    the channels and have to be of the same times.

    >>> from pathlib import Path
    >>> rows = "".join(f"2020-01-{day:02},{day % 7}\\n" for day in range(1, 32))
    >>> written = Path("daily.csv").write_text("day,sold\\n" + rows)
    >>> data = TableData("daily.csv", time="day", batch_size=4)
    >>> data.look_back, data.horizon = 3, 1
    >>> data.setup()
    >>> data.names, data.frequency, data.period, len(data.windows("train")), data.scaler.mean
    (('sold',), 'D', 7, 18, (3.0,))
    """

    def __init__(
        self,
        path: str,
        time: str | None = None,
        columns: list[str] | None = None,
        id: str | None = None,
        frequency: str | None = None,
        missing: Missing = "refuse",
        longest: int = LONGEST,
        time_format: str | None = None,
        train_share: float = 0.7,
        test_share: float = 0.2,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.path = path
        self.id = id
        self.how: dict[str, Any] = {
            "time": time,
            "columns": columns,
            "frequency": frequency,
            "missing": missing,
            "longest": longest,
            "time_format": time_format,
        }
        self.shares = train_share, test_share

    def read(self) -> Series:
        if self.id is None:
            return read_table(self.path, **self.how)
        return side_by_side(read_long(self.path, id=self.id, **self.how))

    def cut(self, rows: int, look_back: int) -> Borders:
        return borders.shares(rows, look_back, *self.shares)


def _with_last(series: Series, target: str) -> Series:
    """The target's column moved to the end, as the usual loader does it."""
    if target not in series.names:
        raise AdaptError(f"there is no column {target!r}: there are {', '.join(series.names)}")
    return series.columns([*(name for name in series.names if name != target), target])
