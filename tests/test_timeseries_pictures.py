"""Forecasts as pictures: what is drawn, for which rows, and what cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from polyadapt.core.errors import AdaptError
from polyadapt.core.images import pictures as core
from polyadapt.timeseries.outlook import Outlook
from polyadapt.timeseries.pictures import Interval, Panel, forecast_picture, panels_of
from polyadapt.timeseries.series import Series, Values

HOURS = np.datetime64("2024-01-01", "ns") + np.arange(9) * np.timedelta64(1, "h")
TABLE: Values = np.arange(12, dtype=np.float64).reshape(6, 2)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are turned into files."""
    figures: list[Figure] = []
    png = core.png

    def keep(figure: Figure) -> bytes:
        figures.append(figure)
        return png(figure)

    monkeypatch.setattr(core, "png", keep)
    return figures


def outlook(**changes: Any) -> Outlook:
    settings: dict[str, Any] = {
        "names": ("b",),
        "values": np.array([[20.0], [21.0], [22.0]]),
        "times": HOURS[6:],
        "first": 6,
    }
    return Outlook(**settings | changes)


def test_a_panel_holds_the_last_rows_of_its_channel_and_their_times() -> None:
    (panel,) = panels_of(Series(TABLE, ("a", "b"), HOURS[:6], "h"), outlook(), context=2)
    assert panel.name == "b"
    assert panel.past.tolist() == [9.0, 11.0]
    assert panel.forecast.tolist() == [20.0, 21.0, 22.0]
    assert panel.rows.tolist() == HOURS[4:].tolist()


def test_without_times_rows_are_counted_from_the_first_that_is_forecast() -> None:
    (panel,) = panels_of(Series(TABLE, ("a", "b")), outlook(times=None), context=2)
    assert panel.rows.tolist() == [-2, -1, 0, 1, 2]


def test_quantiles_that_belong_together_are_an_interval_the_widest_first() -> None:
    levels = {q: np.full((3, 1), q) for q in (0.9, 0.5, 0.25, 0.1, 0.75, 0.3)}
    (panel,) = panels_of(Series(TABLE, ("a", "b")), outlook(times=None, quantiles=levels))
    shares = [round(band.share, 6) for band in panel.intervals]
    assert shares == [0.8, 0.5]
    assert [(band.low[0], band.high[0]) for band in panel.intervals] == [(0.1, 0.9), (0.25, 0.75)]


def test_the_picture_shows_past_truth_forecast_and_intervals(drawn: list[Figure]) -> None:
    band = Interval(0.8, np.array([1.0, 2.0]), np.array([3.0, 5.0]))
    past, forecast, truth = np.array([0.0, 1.0]), np.array([2.0, 3.0]), np.array([2.5])
    picture = forecast_picture([Panel("load", past, forecast, truth, [band])], "A day ahead")
    assert picture[1:4] == b"PNG"
    (axis,) = drawn[0].axes
    _, names = axis.get_legend_handles_labels()
    assert set(names) == {"past", "what came", "forecast", "80 %"}
    lines = {str(line.get_label()): line.get_xydata().tolist() for line in axis.lines}  # type: ignore[union-attr]
    assert lines["past"] == [[-2, 0], [-1, 1]]
    assert lines["forecast"] == [[0, 2], [1, 3]]
    assert lines["what came"] == [[0, 2.5]]
    assert axis.get_title() == "load"


def test_a_step_on_its_own_is_seen(drawn: list[Figure]) -> None:
    forecast_picture([Panel("load", np.zeros(2), np.ones(1))], "one step")
    marks = {line.get_label(): line.get_marker() for line in drawn[0].axes[0].lines}
    assert marks["forecast"] == "o"


def test_of_many_channels_the_first_twelve_are_drawn(drawn: list[Figure]) -> None:
    panels = [Panel(f"c{place}", np.zeros(2), np.ones(2)) for place in range(13)]
    forecast_picture(panels, "all")
    assert [a.get_title() for a in drawn[0].axes if a.get_title()] == [f"c{i}" for i in range(12)]
    assert drawn[0].get_suptitle() == "all (the first 12 of 13 channels)"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"forecast": np.zeros(0)}, "load: a forecast without a step cannot be drawn"),
        ({"truth": np.zeros(3)}, "load: truth is longer than 2 steps"),
        ({"times": HOURS}, "load: 9 times for 6 rows"),
        (
            {"intervals": [Interval(0.8, np.zeros(1), np.zeros(2))]},
            r"load: intervals of \(1, 2\), not 2 steps",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(AdaptError, match=told):
        Panel(**{"name": "load", "past": np.zeros(4), "forecast": np.zeros(2)} | changes)


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(AdaptError, match="there is no forecast to draw"):
        forecast_picture([], "nothing")
    with pytest.raises(AdaptError, match="context=0 is not allowed"):
        panels_of(Series(TABLE, ("a", "b")), outlook(times=None), context=0)
