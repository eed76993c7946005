"""Pictures of forecasts: the past, what was forecast with its intervals, and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import AdaptError
from ..core.recipe import require
from .series import Series, Times, Values

if TYPE_CHECKING:
    from .outlook import Outlook

_MOST = 12  # more channels than this cannot be read on one page


@dataclass(frozen=True)
class Interval:
    """Where the future lies with probability `share`: from `low` to `high`, [T] each."""

    share: float
    low: Values
    high: Values


@dataclass(frozen=True)
class Panel:
    """One channel: its past [L], its forecast [T], what came [up to T], wider intervals first.

    times: of past and forecast, [L + T]; without them rows are counted, the forecast's from 0.
    """

    name: str
    past: Values
    forecast: Values
    truth: Values | None = None
    intervals: Sequence[Interval] = field(default_factory=tuple)
    times: Times | None = None

    def __post_init__(self) -> None:
        ahead = len(self.forecast)
        require(ahead > 0, f"{self.name}: a forecast without a step cannot be drawn")
        lengths = {"truth": 0 if self.truth is None else len(self.truth)}
        require(lengths["truth"] <= ahead, f"{self.name}: truth is longer than {ahead} steps")
        for band in self.intervals:
            ends = len(band.low), len(band.high)
            require(ends == (ahead, ahead), f"{self.name}: intervals of {ends}, not {ahead} steps")
        rows = len(self.past) + ahead
        known = rows if self.times is None else len(self.times)
        require(known == rows, f"{self.name}: {known} times for {rows} rows")

    @property
    def rows(self) -> Any:
        """Where the values of past and forecast are drawn: times, or numbers."""
        numbers = np.arange(-len(self.past), len(self.forecast))
        return numbers if self.times is None else self.times


def panels_of(
    series: Series, outlook: Outlook, context: int = 168, truth: Values | None = None
) -> list[Panel]:
    """A panel for each channel of a forecast behind the last `context` rows of its series.

    `truth`: [up to T, C], the channels of the forecast in their order. Quantiles q and 1 - q make
    an interval of share 1 - 2 q.
    """
    require(context >= 1, f"context={context} is not allowed: a whole number from 1")
    own = series.columns(outlook.names)
    past = own.values[-context:]
    times = None
    if own.times is not None and outlook.times is not None:
        times = np.concatenate([own.times[-context:], outlook.times])
    return [
        Panel(
            name,
            past[:, place],
            outlook.values[:, place],
            None if truth is None else truth[:, place],
            [
                Interval(band.share, band.low[:, place], band.high[:, place])
                for band in _bands(outlook)
            ],
            times,
        )
        for place, name in enumerate(outlook.names)
    ]


def _bands(outlook: Outlook) -> list[Interval]:
    """Intervals of all channels, [T, C], the widest first."""
    return [
        Interval(1 - 2 * low, outlook.quantiles[low], outlook.quantiles[high])
        for low in sorted(outlook.quantiles)
        for high in outlook.quantiles
        if low < 0.5 and math.isclose(high, 1 - low)
    ]


def forecast_picture(panels: Sequence[Panel], title: str) -> bytes:
    """A PNG: a panel for each channel, at most twelve; the title says how many there are.

    >>> line = np.arange(8.0)
    >>> forecast_picture([Panel("load", line, line[:3] + 8)], "ahead")[1:4]
    b'PNG'
    """
    from matplotlib.figure import Figure

    from ..core.images.pictures import png

    if not panels:
        raise AdaptError("there is no forecast to draw")
    shown = panels[:_MOST]
    columns = 1 if len(shown) == 1 else 2
    lines = math.ceil(len(shown) / columns)
    figure = Figure(
        figsize=(5 + 4 * (columns - 1), 0.6 + 2.4 * lines), dpi=120, layout="constrained"
    )
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, panel in zip(axes, shown, strict=False):
        _draw(axis, panel)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    axes[0].legend(fontsize=7, loc="upper left")
    more = f" (the first {_MOST} of {len(panels)} channels)" if len(panels) > _MOST else ""
    figure.suptitle(title + more)
    return png(figure)


def _draw(axis: Any, panel: Panel) -> None:
    rows, here = panel.rows, len(panel.past)
    axis.plot(rows[:here], panel.past, color="black", linewidth=1, label="past")
    if panel.truth is not None:
        came = rows[here : here + len(panel.truth)]
        axis.plot(came, panel.truth, color="black", linewidth=1, linestyle=":", label="what came")
    for band in panel.intervals:
        told = f"{100 * band.share:.3g} %"
        axis.fill_between(rows[here:], band.low, band.high, color="C0", alpha=0.2, label=told)
    axis.plot(
        rows[here:], panel.forecast, color="C0", linewidth=1.4, marker=_dot(panel), label="forecast"
    )
    axis.axvline(rows[here], color="grey", linewidth=0.6)
    axis.set_title(panel.name, fontsize=9)
    axis.tick_params(labelsize=7, axis="both")
    if panel.times is None:
        axis.set_xlabel("rows ahead", fontsize=7)
    else:
        axis.tick_params(axis="x", rotation=20)
    axis.grid(alpha=0.3)


def _dot(panel: Panel) -> str | None:
    """A line of one step is a dot, or nothing would be seen."""
    return "o" if len(panel.forecast) == 1 else None
