"""One-for-All fitted to a table of its own in about a minute, and measured on rows held out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..core.adapters.lora import LoRA
from ..core.building import seeded
from ..core.errors import AdaptError
from . import borders
from .adapters import code
from .aims import Forecast
from .backbones import Backbone
from .baselines import LastValue, SeasonalNaive
from .borders import Borders
from .data import SeriesData
from .description import sizes
from .methods import Forecaster as Forecasts
from .patches import Patches
from .protocol import Candidate, Errors, Protocol, fit, measure
from .series import Series
from .task import SeriesTask
from .windows import Windows, every_window

_LONGEST = 336  # rows of look-back that are not asked for
_TRAIN, _TEST = 0.7, 0.2
_MEASURED = 512  # held-out windows, evenly spread; more say little more


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is fitted, and how much of it.

    `look_back` None: a third of the training rows, at most 336. The rate is that of the few-shot
    scripts of arXiv 2603.29756, the adapters and their scale are its code's.
    """

    backbone: Backbone
    horizon: int
    look_back: int | None = None
    windows: int = 1024
    epochs: int = 5
    batch_size: int = 32
    lr: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Fit:
    """A fitted model and its errors on held-out rows, by the name of what made the forecast.

    `rows` are held out, `windows` of them are measured; errors are in standard deviations of each
    channel.
    """

    task: SeriesTask
    errors: dict[str, Errors]
    rows: int
    windows: int
    seconds: float

    @property
    def better(self) -> dict[str, list[str]]:
        """What learns nothing and errs no more than the fitted model, by "MSE" and by "MAE"."""
        own, *others = self.errors.items()
        found = {
            measure.upper(): [
                n for n, e in others if getattr(e, measure) <= getattr(own[1], measure)
            ]
            for measure in ("mse", "mae")
        }
        return {measure: names for measure, names in found.items() if names}

    def report(self) -> str:
        """The errors as a table."""
        head = f"the last {self.rows:,} rows, held out: {self.windows:,} windows, scaled columns"
        lines = [f"{name:<16} MSE {e.mse:.4f}  MAE {e.mae:.4f}" for name, e in self.errors.items()]
        return "\n".join([head, *lines])


class OwnTable(SeriesData):
    """A series in memory, cut 70 : 10 : 20."""

    def __init__(self, own: Series, **common: Any) -> None:
        super().__init__(**common)
        self.own = own

    def read(self) -> Series:
        return self.own

    def cut(self, rows: int, look_back: int) -> Borders:
        return borders.shares(rows, look_back, _TRAIN, _TEST)


def fit_table(series: Series, plan: Plan) -> Fit:
    """Fit to the first 70 % of the rows, keep the epoch that is best on the next 10 %, measure.

    Raises `AdaptError` for a table that is too short for horizon and look-back.
    """
    begin, look_back = time.perf_counter(), _look_back(len(series), plan)
    data = _data(series, plan, look_back)
    length = min(16, look_back)
    task = SeriesTask(
        plan.backbone,
        _recipe(plan.horizon),
        aim=Forecast(horizon=plan.horizon),
        look_back=look_back,
        patches=Patches(length, length),
        seed=plan.seed,
        seed_of_layers=plan.seed,
    )
    candidate = Candidate(Forecasts(task.network), task.adapters)
    with seeded(plan.seed):  # dropout
        fit(candidate, data, Protocol(epochs=plan.epochs), plan.lr)
    task.about = task.about.of(data)
    task.adapters.extra = {**task.about.to_json(), "bytes": sizes(task.adapters, task.network)}
    held_out = data.windows("test")
    rows = len(held_out.rows) - look_back
    kept = _spread(held_out, _MEASURED)
    rivals = _rivals(candidate.model, plan.horizon, look_back, data.period)
    errors = {name: measure(model, _batches(held_out, kept)) for name, model in rivals.items()}
    return Fit(task, errors, rows, len(kept), time.perf_counter() - begin)


def _recipe(horizon: int) -> LoRA:
    """That of the authors' code, scale 4; a rank of 16 does not fit a shorter horizon.

    >>> _recipe(4).rank, _recipe(4).scale_of(4), _recipe(96).alpha
    (4, 4.0, 16.0)
    """
    rank = min(16, horizon)
    return replace(code(rank).recipe, alpha=4 * math.sqrt(rank))


def _look_back(rows: int, plan: Plan) -> int:
    """Refused when the table has no window in one of its parts."""
    if plan.look_back is not None:
        return plan.look_back
    needed = 10 * plan.horizon + 10  # the validation part is a tenth
    if rows < needed:
        raise AdaptError(
            f"the table has {rows} rows: to fit and measure a horizon of {plan.horizon} it needs"
            f" {needed}; shorten the horizon, or forecast with --set FILE"
        )
    return max(1, min(_LONGEST, int(_TRAIN * rows) // 3))


def _data(series: Series, plan: Plan, look_back: int) -> OwnTable:
    """Set up, with at most `_MEASURED` validation windows or so."""
    data = OwnTable(
        series, batch_size=plan.batch_size, windows_per_epoch=plan.windows, seed=plan.seed
    )
    data.look_back, data.horizon = look_back, plan.horizon
    data.setup()
    for part in ("train", "test"):
        data.windows(part)  # refused before anything is trained
    data.every = max(1, len(data.windows("val")) // _MEASURED)
    return data


def _rivals(model: nn.Module, horizon: int, look_back: int, period: int) -> dict[str, nn.Module]:
    """The fitted model, and what it has to beat."""
    found = {"One-for-All": model, "last value": LastValue(horizon)}
    if 1 < period <= look_back:
        found["seasonal naive"] = SeasonalNaive(horizon, period)
    return found


def _spread(windows: Windows, most: int) -> list[int]:
    """Positions of at most `most` windows or one per channel, evenly spread."""
    step = -(-windows.starts * windows.channels // most)
    return every_window(windows, step)


def _batches(windows: Windows, positions: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, len(positions), 64):
        yield windows.__getitems__(positions[first : first + 64])


def described(plan: Plan) -> str:
    """The plan in a line."""
    settings = plan.backbone.to_json()
    name = settings.pop("backbone")
    told = ", ".join(f"{key}={value}" for key, value in settings.items())
    amount = f"{plan.epochs} epochs of up to {plan.windows:,} windows"
    return f"One-for-All on {name}({told}), {amount}"
