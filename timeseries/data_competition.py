"""Data modules of the M competitions: one short window of each of many series."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Generator
from torch.utils.data import DataLoader

from ..core.batches import for_training, in_order, require_batches
from ..core.errors import AdaptError
from .competition import M3_RULES, M4_RULES, Contest, Rules, read_m4, read_tsf
from .competition_windows import DrawnWindows, LastWindows
from .gaps import Missing, filled
from .metrics import mase, naive_error, owa, smape
from .naive2 import naive2
from .series import Values


@dataclass(frozen=True)
class Scores:
    """Means over all series; sMAPE in per cent, OWA 1 for Naive2."""

    smape: float
    mase: float
    owa: float


class CompetitionData(LightningDataModule, ABC):
    """Many series, each forecast once from its end; windows are in the data's own units.

    Training draws one window of every series in each epoch, validation takes the last one of a
    share of the series that training does not see (`val_share`, by `seed`), the test forecasts what
    came after. `look_back` and `horizon` are the forecaster's, as in `SeriesData`; the usual code
    for M4 takes a look-back of twice the horizon. A forecaster of more steps than the competition
    asks for can be tested too: the truths then are shorter than its horizon.

    After `setup`: `contest`, `rules`, `period`. `scores` judges the test's forecasts.
    """

    scaler = None
    frequency: str | None = None

    def __init__(
        self,
        *,
        batch_size: int = 32,
        val_share: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        require_batches(batch_size, num_workers)
        if not 0 <= val_share < 1:
            raise AdaptError(f"val_share={val_share:g} is not allowed: from 0, below 1")
        self.batch_size = batch_size
        self.val_share = val_share
        self.seed = seed
        self.num_workers = num_workers
        self.look_back: int | None = None
        self.horizon: int | None = None
        self._read: tuple[Contest, Rules] | None = None

    @abstractmethod
    def read(self) -> tuple[Contest, Rules]:
        """The series, and what the competition asks for."""

    def setup(self, stage: str | None = None) -> None:
        if self._read is None:
            self._read = self.read()

    @property
    def contest(self) -> Contest:
        return self._known()[0]

    @property
    def rules(self) -> Rules:
        return self._known()[1]

    @property
    def period(self) -> int:
        return self.rules.period

    def _known(self) -> tuple[Contest, Rules]:
        if self._read is None:
            raise AdaptError("the series are not read yet: call setup() first")
        return self._read

    def train_dataloader(self) -> DataLoader[Any]:
        look_back, horizon = self._shape()
        series = self._long_enough(self._parts()[0], horizon)
        reach = int(self.rules.history * horizon)
        return for_training(self, DrawnWindows(series, look_back, horizon, reach, self.seed))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        look_back, horizon = self._shape()
        series = self._long_enough(self._parts()[1], horizon)
        if not series:
            return []
        pasts, futures = zip(*((s[:-horizon], s[-horizon:]) for s in series), strict=True)
        return in_order(self, LastWindows(pasts, futures, look_back))

    def test_dataloader(self) -> DataLoader[Any]:
        look_back, _ = self._shape()
        return in_order(self, LastWindows(self.contest.pasts, self.contest.futures, look_back))

    def scores(self, forecasts: Values, naive2_forecasts: Values | None = None) -> Scores:
        """Of forecasts [series, steps] in the order of the test; surplus steps do not count.

        OWA is relative to our `naive2`, or to the forecasts given, see `read_forecasts`.
        """
        if naive2_forecasts is None:
            steps = self.rules.horizon
            ours = [naive2(past, self.period, steps) for past in self.contest.pasts]
            naive2_forecasts = np.stack(ours)
        own, reference = self._errors(forecasts), self._errors(naive2_forecasts)
        return Scores(*own, owa(*own, *reference))

    def _errors(self, forecasts: Values) -> tuple[float, float]:
        """sMAPE and MASE."""
        truth = np.stack(self.contest.futures)
        if forecasts.ndim != 2 or len(forecasts) != len(truth):
            raise AdaptError(f"forecasts {list(forecasts.shape)}: there are {len(truth)} series")
        if forecasts.shape[1] < truth.shape[1]:
            raise AdaptError(
                f"forecasts of {forecasts.shape[1]} steps: the competition asks for"
                f" {truth.shape[1]}"
            )
        own = forecasts[:, : truth.shape[1]].astype(np.float64)
        errors = np.array([naive_error(past, self.period) for past in self.contest.pasts])
        return smape(own, truth), mase(own, truth, errors)

    def _shape(self) -> tuple[int, int]:
        if self.look_back is None or self.horizon is None:
            raise AdaptError("set data.look_back and data.horizon first")
        if not self.horizon:
            raise AdaptError("the series of a competition are for the aim Forecast alone")
        if self.horizon < self.rules.horizon:
            raise AdaptError(
                f"horizon={self.horizon}: the competition asks for {self.rules.horizon} steps"
            )
        return self.look_back, self.horizon

    def _parts(self) -> tuple[list[int], list[int]]:
        """Numbers of the series for training and for validation."""
        number = len(self.contest.pasts)
        order = torch.randperm(number, generator=Generator().manual_seed(self.seed)).tolist()
        held = round(self.val_share * number)
        if held == number:
            raise AdaptError(f"no series of {number} is left for training: lower val_share")
        return sorted(order[held:]), sorted(order[:held])

    def _long_enough(self, places: Sequence[int], horizon: int) -> list[Values]:
        for place in places:
            if len(self.contest.pasts[place]) <= horizon:
                raise AdaptError(
                    f"series {self.contest.names[place]!r} has {len(self.contest.pasts[place])}"
                    f" rows: to train on horizon={horizon} needs {horizon + 1}"
                )
        return [self.contest.pasts[place] for place in places]


class M4(CompetitionData):
    """One frequency of M4 (Yearly, Quarterly, Monthly, Weekly, Daily, Hourly), see `read_m4`.

    `history` sets how far back training windows are drawn from, in horizons (`Rules.history`).
    """

    def __init__(
        self, folder: str, frequency: str, history: float | None = None, **common: Any
    ) -> None:
        super().__init__(**common)
        if frequency not in M4_RULES:
            raise AdaptError(f"M4 has no frequency {frequency!r}: {', '.join(M4_RULES)}")
        self.folder = folder
        self.frequency_ = frequency
        self.history = history

    def read(self) -> tuple[Contest, Rules]:
        rules = _with_history(M4_RULES[self.frequency_], self.history)
        return read_m4(self.folder, self.frequency_), rules


class M3(CompetitionData):
    """M3, M1 or another archive of series in a .tsf file: the last `horizon` values are the test.

    group: Yearly, Quarterly, Monthly or Other, None takes the file's @frequency; missing: what
    happens to missing values, see `gaps.filled`.
    """

    def __init__(
        self,
        path: str,
        group: str | None = None,
        history: float | None = None,
        missing: Missing = "refuse",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if group is not None and group not in M3_RULES:
            raise AdaptError(f"M3 has no group {group!r}: {', '.join(M3_RULES)}")
        self.path = path
        self.group = group
        self.history = history
        self.missing: Missing = missing

    def read(self) -> tuple[Contest, Rules]:
        archive = read_tsf(self.path)
        group = self.group or str(archive.frequency).capitalize()
        if group not in M3_RULES:
            raise AdaptError(
                f"{self.path} is of @frequency {group}: say the group, one of {', '.join(M3_RULES)}"
            )
        rules = _with_history(M3_RULES[group], self.history)
        horizon = rules.horizon if archive.horizon is None else archive.horizon
        if short := [name for name, v in archive.series.items() if len(v) <= horizon]:
            raise AdaptError(f"{self.path}: series {short[0]!r} has no row before its test")
        whole = [self._filled(name, values) for name, values in archive.series.items()]
        return Contest(
            tuple(archive.series),
            tuple(values[:-horizon] for values in whole),
            tuple(values[-horizon:] for values in whole),
        ), Rules(horizon, rules.period, rules.history)

    def _filled(self, name: str, values: Values) -> Values:
        whose = f"{self.path}, series {name!r}"
        return filled(values[:, None], ["value"], self.missing, whose=whose)[:, 0]


def _with_history(rules: Rules, history: float | None) -> Rules:
    if history is None:
        return rules
    if history < 1:
        raise AdaptError(f"history={history:g} is not allowed: from 1, in horizons")
    return Rules(rules.horizon, rules.period, history)
