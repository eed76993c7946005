"""An adapter file in use: what follows the last row of a series."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Self

import numpy as np
import torch

from ..core.errors import AdaptError, StoreError
from .aims import Forecast
from .columns import counted
from .description import Description, describe, load_set
from .network import Network
from .outlook import Outlook, later_times
from .series import Series, Values, season

_AT_ONCE = 256  # windows in a pass


class Forecaster:
    """Forecasts the rows after a series, in its own units, up to the trained horizon.

    `called` names it in errors. It knows the look-back, the columns, their scaling and the step of
    the rows that it was trained on, and refuses a series of other ones; a file without column names
    (of M3 or M4, say) takes any, one at a time.
    """

    def __init__(self, about: Description, network: Network, called: str) -> None:
        if not isinstance(about.aim, Forecast):
            kind = type(about.aim).__name__
            raise StoreError(f"{called} does not forecast: it was trained to {kind}; see `predict`")
        self.about = about
        self.aim: Forecast = about.aim
        self.network = network.eval()
        self.called = called

    @classmethod
    def from_file(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """`StoreError` for a file that is missing, damaged or holds no forecaster."""
        about = describe(path)
        made = cls(about, about.network(), str(path))
        load_set(made.network, path)
        made.network.to(device)
        return made

    def forecast(self, series: Series, horizon: int | None = None) -> Outlook:
        """The `horizon` rows after `series`; None: as many as it was trained for.

        Raises `AdaptError` for a horizon beyond that, fewer rows than the look-back, another number
        of channels, another step between rows, and a value in the last rows that is not finite.
        """
        ahead = self.aim.horizon if horizon is None else horizon
        self._check(series, ahead)
        past = series.values[-self.about.look_back :]
        found = self.answers(past[None])[0, :ahead]
        by_level = (
            dict(zip(self.levels, np.moveaxis(found, -1, 0), strict=True)) if self.levels else {}
        )
        quantiles = {level: each for level, each in by_level.items() if level != 0.5}
        times = later_times(series, ahead)
        return Outlook(series.names, self.point(found), times, len(series) + 1, quantiles)

    @property
    def levels(self) -> tuple[float, ...]:
        """Of the quantiles that are forecast; none with another loss."""
        return self.aim.levels if self.aim.loss == "quantile" else ()

    def point(self, answers: Values) -> Values:
        """One number per step and channel: [..., T, C], the median of quantiles [..., T, C, Q]."""
        return answers[..., self.levels.index(0.5)] if self.levels else answers

    @torch.inference_mode()
    def answers(self, past: Values) -> Values:
        """Pasts [n, L, C] -> [n, T, C], with quantiles [n, T, C, Q], all in the table's units."""
        scaler = self.about.scaler
        scaled = past if scaler is None else scaler.apply(past)
        device = self.network.in_layer.weight.device
        found = []
        for first in range(0, len(scaled), _AT_ONCE):
            x = torch.from_numpy(scaled[first : first + _AT_ONCE]).float().to(device)
            found.append(self.aim.answer(self.network, x).double().cpu().numpy())
        answers: Values = np.concatenate(found)
        if scaler is None:
            return answers
        if answers.ndim == 3:
            return scaler.undo(answers)
        return np.moveaxis(scaler.undo(np.moveaxis(answers, -1, 1)), 1, -1)

    def _check(self, series: Series, ahead: int) -> None:
        about = self.about
        if not 1 <= ahead <= self.aim.horizon:
            raise AdaptError(
                f"horizon={ahead} is not allowed: {self.called} was trained for 1 to"
                f" {self.aim.horizon} rows"
            )
        self.check_columns(series)
        if len(series) < about.look_back:
            raise AdaptError(
                f"the table has {len(series)} rows: {self.called} looks back on {about.look_back}"
            )
        if not np.isfinite(series.values[-about.look_back :]).all():
            raise AdaptError(f"a value of the last {about.look_back} rows is missing or infinite")

    def check_columns(self, series: Series) -> None:
        """The series has as many channels as were trained on, and their step."""
        about = self.about
        wanted = None if about.scaler is None else len(about.scaler.mean)
        if wanted not in (None, len(series.names)):
            whose = ", ".join(about.names or ())
            raise AdaptError(
                f"the table has {counted(len(series.names), 'column')} to forecast"
                f" ({', '.join(series.names)}), {self.called} was trained on {wanted} ({whose})"
            )
        require_step(about.frequency, series.frequency, self.called)


def require_step(trained: str | None, found: str | None, called: object) -> None:
    """Refuse a table of another step than a set was trained on."""
    if not _same(trained, found):
        raise AdaptError(
            f"the table has a row every {found}, {called} was trained on rows every {trained}:"
            " resample the table, or fit it its own set"
        )


def _same(one: str | None, other: str | None) -> bool:
    """Two frequencies are the same step: weeks from Sunday and from Monday are; None may be any.

    >>> _same("h", "60min"), _same("W-SUN", "W-MON"), _same("MS", "ME"), _same("D", "B")
    (True, True, True, False)
    """
    return None in (one, other) or math.isclose(_days(one), _days(other), rel_tol=0.01)


def _days(frequency: str | None) -> float:
    """Of a step, on average."""
    import pandas as pd

    season(frequency or "")  # refuses what is none
    begin = pd.Timestamp("2001-01-01")
    later = begin + 28 * pd.tseries.frequencies.to_offset(frequency)
    return float((later - begin) / pd.Timedelta(days=28))


def device() -> str:
    """Where the commands compute."""
    return "cuda" if torch.cuda.is_available() else "cpu"
