"""An adapter file that classifies, fills or judges, in use: windows of a table -> answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..core.errors import AdaptError
from .aims import Impute
from .columns import counted, once, trained_columns
from .deployed import Deployed, channels_of
from .description import describe, load_set
from .forecaster import device
from .frames import numbers
from .series import Values

if TYPE_CHECKING:
    import pandas as pd

_AT_ONCE = 256  # windows in a pass


class Model:
    """A set that classifies, fills or judges: windows [n, L, C] in their own units -> answers.

    Raises `StoreError` for a file that is missing, damaged or holds no time series model.
    """

    def __init__(self, path: Path) -> None:
        self.about = describe(path)
        network = self.about.network().eval()
        load_set(network, path)
        self.path = path
        self.length, self.channels = self.about.look_back, channels_of(self.about)
        # Scaled here in fp64: in fp32 a small change of a large number is lost.
        self.module = Deployed(replace(self.about, scaler=None), network).to(device())

    @torch.inference_mode()
    def __call__(self, windows: Values) -> Values:
        """See `Deployed`; what is filled is in the units of the table, scores stay scaled."""
        scaler = self.about.scaler
        scaled = windows if scaler is None else scaler.apply(windows)
        found = []
        for first in range(0, len(scaled), _AT_ONCE):
            x = torch.from_numpy(scaled[first : first + _AT_ONCE]).float().to(device())
            found.append(self.module(x).double().cpu().numpy())
        answers: Values = np.concatenate(found)
        fills = isinstance(self.about.aim, Impute) and scaler is not None
        return scaler.undo(answers) if fills and scaler is not None else answers

    def read(self, frame: pd.DataFrame, table: Path, chosen: Sequence[str] | None) -> Values:
        """[rows, C], NaN where one is missing: the columns that were trained on, or `chosen`."""
        names = self.names(frame, table, chosen)
        found = [numbers(frame[name], f"{table}, column {name!r}") for name in names]
        return np.stack(found, axis=1)

    def names(self, frame: pd.DataFrame, table: Path, chosen: Sequence[str] | None) -> list[str]:
        """Their names."""
        trained = self.about.names or ()
        if chosen is None and not trained:
            raise AdaptError(f"{self.path} names no columns: name them with --columns")
        wanted = trained if chosen is None else chosen
        names = once(trained_columns(wanted, list(frame.columns), table, self.path), table)
        if len(names) != self.channels:
            raise AdaptError(
                f"{counted(len(names), 'column')} named, {self.path} was trained on {self.channels}"
            )
        return list(names)


def tiles(rows: int, length: int, whose: object = "the table") -> list[tuple[int, int]]:
    """Windows that cover all rows: (first row, rows of it that are new); the last ends at the end.

    >>> tiles(10, 4)
    [(0, 4), (4, 4), (6, 2)]
    """
    if rows < length:
        raise AdaptError(f"{whose} has {rows} rows: a window of the set has {length}")
    found = [(first, length) for first in range(0, rows - length + 1, length)]
    rest = rows % length
    return [*found, (rows - length, rest)] if rest else found


def by_rows(model: Model, values: Values, table: Path) -> Values:
    """The answers for all rows of a table, [rows] or [rows, C], each from one window."""
    places = tiles(len(values), model.length, table)
    windows = np.stack([values[first : first + model.length] for first, _ in places])
    if len(empty := np.argwhere(np.isnan(windows).all(axis=1))):
        first = places[int(empty[0, 0])][0]
        raise AdaptError(
            f"{table}: a column has no value in rows {first + 1} to {first + model.length}: a"
            f" window of {model.length} rows needs one"
        )
    answers = model(windows)
    parts = [found[-new:] for found, (_, new) in zip(answers, places, strict=True)]
    return np.concatenate(parts)
