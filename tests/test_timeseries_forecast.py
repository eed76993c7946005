"""`polyadapt timeseries forecast`: what it writes, what it refuses, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from polyadapt.core import AdaptError
from polyadapt.core.cli import main
from polyadapt.tests.timeseries_sets import (
    FORECAST,
    HORIZON,
    LOOK_BACK,
    NAMES,
    SCALER,
    TINY,
    saved_set,
    table,
)
from polyadapt.timeseries import own_fit
from polyadapt.timeseries.aims import Forecast, Impute
from polyadapt.timeseries.backbones import NoLanguageModel
from polyadapt.timeseries.forecaster import Forecaster
from polyadapt.timeseries.outlook import Outlook, as_csv, later_times
from polyadapt.timeseries.own_fit import Plan, fit_table
from polyadapt.timeseries.series import Series
from polyadapt.timeseries.tables import read_table
from polyadapt.timeseries.task import SeriesTask

Told = Callable[[], tuple[str, str]]
SMALL = NoLanguageModel(width=16)


def forecast(*words: object) -> int:
    return main(["timeseries", "forecast", *map(str, words)])


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    return lambda: tuple(capsys.readouterr())  # type: ignore[return-value]


def _frame(file: Path) -> pd.DataFrame:
    return pd.read_csv(file)


# With an adapter file


def test_a_set_forecasts_the_rows_after_the_last_one_in_the_units_of_the_table(
    tmp_path: Path,
) -> None:
    file = saved_set(tmp_path / "set.safetensors", backbone=TINY)
    csv = table(tmp_path / "table.csv")
    assert forecast(csv, "--time", "date", "--set", file, "--out", tmp_path / "out.csv") == 0
    found = _frame(tmp_path / "out.csv")
    assert list(found.columns) == ["date", *NAMES]
    assert len(found) == HORIZON
    assert found["date"].iloc[0] == "2024-01-09 08:00:00"  # row 201 of hours from 1 January on
    assert found["date"].iloc[-1] == "2024-01-10 07:00:00"

    mean, std = torch.tensor(SCALER.mean), torch.tensor(SCALER.std)
    past = torch.from_numpy(read_table(csv, time="date").values[-LOOK_BACK:]).float()
    with torch.no_grad():
        task = SeriesTask.from_file(file).eval()
        wanted = task(((past - mean) / std)[None])[0] * std + mean
    np.testing.assert_allclose(found[list(NAMES)].to_numpy(), wanted.numpy(), rtol=1e-5)


def test_a_shorter_horizon_is_the_beginning_of_the_whole_one(tmp_path: Path, told: Told) -> None:
    file, csv = saved_set(tmp_path / "set.safetensors"), table(tmp_path / "table.csv")
    texts = []
    for more in ([], ["--horizon", 3]):
        assert forecast(csv, "--time", "date", "--set", file, *more) == 0
        texts.append(told()[0])
    assert texts[0].startswith(texts[1])
    assert [len(text.splitlines()) for text in texts] == [1 + HORIZON, 4]


def test_quantiles_become_columns_that_do_not_cross(tmp_path: Path, told: Told) -> None:
    aim = Forecast(horizon=HORIZON, loss="quantile", levels=(0.1, 0.5, 0.9))
    file, csv = saved_set(tmp_path / "set.safetensors", aim=aim), table(tmp_path / "table.csv")
    out = tmp_path / "out.csv"
    words = ["--time", "date", "--set", file, "--out", out, "--picture", tmp_path / "p.png"]
    assert forecast(csv, *words) == 0
    found = _frame(out)
    assert list(found.columns) == ["date", "load", "load q0.1", "load q0.9", *found.columns[4:]]
    assert (found["load q0.1"] < found["load"]).all()
    assert (found["load"] < found["load q0.9"]).all()
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"
    assert told()[1].splitlines() == [f"picture: {tmp_path / 'p.png'}", f"forecast: {out}"]


def test_columns_are_taken_by_name_in_whatever_order_they_stand(tmp_path: Path, told: Told) -> None:
    file = saved_set(tmp_path / "set.safetensors")
    csv = table(tmp_path / "table.csv", columns=("wind", "load", "OT"))
    pd.read_csv(csv)[["OT", "wind", "date", "load"]].to_csv(tmp_path / "other.csv", index=False)
    outs = []
    for each in (csv, tmp_path / "other.csv"):
        assert forecast(each, "--time", "date", "--set", file) == 0
        outs.append(told()[0])
    assert outs[0] == outs[1]
    assert outs[0].startswith("date,load,OT\n")


def test_other_columns_take_the_places_that_columns_gives_them(tmp_path: Path, told: Told) -> None:
    file = saved_set(tmp_path / "set.safetensors")
    csv = table(tmp_path / "table.csv", columns=("a", "b", "c"))
    assert forecast(csv, "--time", "date", "--set", file) == 2
    assert told()[1] == (
        f"polyadapt: {file} was trained on 2 columns (load, OT), {csv} has date, a, b, c: name 2"
        " columns with --columns, in that order\n"
    )
    assert forecast(csv, "--time", "date", "--set", file, "--columns", "c", "a") == 0
    assert told()[0].startswith("date,c,a\n")


def test_several_series_below_each_other_get_a_forecast_each(tmp_path: Path, told: Told) -> None:
    long = _long(table(tmp_path / "table.csv", columns=("tea", "milk")), tmp_path / "long.csv")
    file = saved_set(tmp_path / "set.safetensors", names=("milk", "tea"))
    wide = Forecaster.from_file(file).forecast(
        read_table(tmp_path / "table.csv", time="date", columns=["milk", "tea"])
    )
    assert forecast(long, "--time", "date", "--id", "shop", "--set", file) == 0
    found = pd.read_csv(_as_file(told()[0], tmp_path))
    assert list(found.columns) == ["shop", "date", "sold"]
    for place, name in enumerate(("milk", "tea")):
        own = found[found["shop"] == name]["sold"].to_numpy()
        np.testing.assert_allclose(own, wide.values[:, place], rtol=1e-6)


def test_a_set_without_scaling_takes_series_of_different_lengths(
    tmp_path: Path, told: Told
) -> None:
    long = _long(table(tmp_path / "table.csv", columns=("tea", "milk")), tmp_path / "long.csv")
    frame = pd.read_csv(long)
    frame[(frame["shop"] == "tea") | (frame["date"] > "2024-01-04")].to_csv(long, index=False)
    file = saved_set(tmp_path / "set.safetensors", names=None, scaler=None)
    assert forecast(long, "--time", "date", "--id", "shop", "--set", file) == 0
    found = pd.read_csv(_as_file(told()[0], tmp_path))
    assert found.groupby("shop", sort=False)["sold"].count().to_dict() == {
        "tea": HORIZON,
        "milk": HORIZON,
    }


def test_rows_without_times_are_counted_on(tmp_path: Path, told: Told) -> None:
    csv = table(tmp_path / "table.csv")
    pd.read_csv(csv).drop(columns="date").to_csv(csv, index=False)
    assert forecast(csv, "--set", saved_set(tmp_path / "set.safetensors"), "--horizon", 2) == 0
    lines = told()[0].splitlines()
    assert lines[0] == "row,load,OT"
    assert [line.partition(",")[0] for line in lines[1:]] == ["201", "202"]  # 200 are there


def test_a_constant_table_is_forecast_near_its_constant(tmp_path: Path, told: Told) -> None:
    csv = table(tmp_path / "table.csv")
    frame = pd.read_csv(csv)
    frame["load"] = 7.0
    frame.to_csv(csv, index=False)
    assert forecast(csv, "--time", "date", "--set", saved_set(tmp_path / "set")) == 0
    found = pd.read_csv(_as_file(told()[0], tmp_path))["load"]
    assert (found - 7).abs().max() < 0.1  # sqrt(1e-5) of the head's output, times 2


# What does not fit is one line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--horizon", "25"], "horizon=25 is not allowed: {set} was trained for 1 to 24 rows"),
        (["--columns", "OT", "OT"], "{csv}: the column 'OT' is named twice"),
        (["--horizon", "0"], "--horizon 0 is not allowed: from 1"),
        (
            ["--columns", "load"],
            "the table has 1 column to forecast (load), {set} was trained on 2 (load, OT)",
        ),
        (["--epochs", "3"], "--epochs is of a fit: with --set none is"),
        (["--save", "x"], "--save is of a fit: with --set none is"),
        (
            ["--covariates", "wind"],
            "known covariates are not supported: 'wind'; only the past of what is forecast is"
            " used, so leave them out",
        ),
        (
            ["--out", "nowhere/x.csv"],
            "cannot write nowhere/x.csv: the folder nowhere does not exist",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_a_set_cannot_do_is_refused(
    words: list[str], said: str, tmp_path: Path, told: Told
) -> None:
    file, csv = saved_set(tmp_path / "set.safetensors"), table(tmp_path / "table.csv")
    assert forecast(csv, "--time", "date", "--set", file, *words) == 2
    assert told() == ("", f"polyadapt: {said.format(set=file, csv=csv)}\n")


def test_a_table_of_another_step_is_refused(tmp_path: Path, told: Told) -> None:
    file, csv = saved_set(tmp_path / "set.safetensors"), table(tmp_path / "table.csv", freq="D")
    assert forecast(csv, "--time", "date", "--set", file) == 2
    assert "a row every D, " in told()[1]


def test_a_set_of_a_step_that_there_is_not_is_one_line(tmp_path: Path, told: Told) -> None:
    file = saved_set(tmp_path / "set.safetensors", frequency="hourly")
    assert forecast(table(tmp_path / "table.csv"), "--time", "date", "--set", file) == 2
    assert told()[1].startswith("polyadapt: frequency='hourly' is not known: write it as pandas")


def test_a_table_shorter_than_the_look_back_is_refused(tmp_path: Path, told: Told) -> None:
    file, csv = saved_set(tmp_path / "set.safetensors"), table(tmp_path / "table.csv", rows=47)
    assert forecast(csv, "--time", "date", "--set", file) == 2
    assert told()[1] == f"polyadapt: the table has 47 rows: {file} looks back on 48\n"


def test_a_set_of_another_aim_is_refused(tmp_path: Path, told: Told) -> None:
    file = saved_set(tmp_path / "set.safetensors", aim=Impute())
    assert forecast(table(tmp_path / "table.csv"), "--time", "date", "--set", file) == 2
    assert f"{file} does not forecast: it was trained to Impute" in told()[1]


def test_a_missing_value_is_refused_by_the_forecaster_itself(tmp_path: Path) -> None:
    forecaster = Forecaster.from_file(saved_set(tmp_path / "set.safetensors"))
    values = np.ones((LOOK_BACK, 2))
    values[-1, 0] = np.nan
    with pytest.raises(AdaptError, match="a value of the last 48 rows is missing or infinite"):
        forecaster.forecast(Series(values, NAMES))


def test_series_of_other_names_are_refused(tmp_path: Path, told: Told) -> None:
    long = _long(table(tmp_path / "table.csv", columns=("tea", "milk")), tmp_path / "long.csv")
    file = saved_set(tmp_path / "set.safetensors", names=("tea", "coffee"))
    assert forecast(long, "--time", "date", "--id", "shop", "--set", file) == 2
    assert "was trained on 2 columns (tea, coffee)" in told()[1]


# Without one: fitted to the table


def test_a_fit_says_what_it_is_worth_and_its_set_forecasts_the_same(
    tmp_path: Path, told: Told
) -> None:
    csv, kept = table(tmp_path / "table.csv", rows=300), tmp_path / "own.safetensors"
    words = ["--time", "date", "--horizon", 12]
    small = ["--backbone", "none", "--epochs", 1, "--windows", 64, "--save", kept]
    assert forecast(csv, *words, *small) == 0
    out, said = told()
    lines = said.splitlines()
    assert lines[0].startswith("fitting One-for-All on NoLanguageModel(")
    assert lines[0].endswith("1 epochs of up to 64 windows")
    assert lines[2] == "the last 60 rows, held out: 98 windows, scaled columns"  # (60 - 11) * 2
    rows = ["One-for-All", "last value", "seasonal naive"]
    assert [line[:16].strip() for line in lines[3:6]] == rows
    assert lines[6:8] == [  # there is no noise
        f"note: by {measure}, seasonal naive did no worse there, and needs no model"
        for measure in ("MSE", "MAE")
    ]
    assert lines[8] == f"adapter file: {kept}"
    assert forecast(csv, *words, "--set", kept) == 0
    assert told() == (out, "")


def test_a_fit_learns(tmp_path: Path) -> None:
    series = read_table(table(tmp_path / "table.csv", rows=400), time="date")
    plan = Plan(backbone=SMALL, horizon=12, look_back=48, windows=256, epochs=4)
    fit = fit_table(series, plan)
    assert fit.errors["One-for-All"].mse < 0.2 * fit.errors["last value"].mse
    assert fit.task.about.scaler is not None
    assert (fit.task.about.names, fit.task.about.frequency) == (NAMES, "h")
    assert fit.errors["seasonal naive"].mse == pytest.approx(0, abs=1e-9)
    assert fit.better == {"MSE": ["seasonal naive"], "MAE": ["seasonal naive"]}


def test_the_same_seed_fits_the_same_model(tmp_path: Path) -> None:
    series = read_table(table(tmp_path / "table.csv", rows=300), time="date")
    plan = Plan(backbone=SMALL, horizon=12, windows=32, epochs=1, seed=3)
    one, other = fit_table(series, plan), fit_table(series, plan)
    assert one.errors == other.errors
    for a, b in zip(one.task.adapters.parameters(), other.task.adapters.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [100, 129])
def test_a_table_too_short_to_fit_is_refused(rows: int, tmp_path: Path, told: Told) -> None:
    csv = table(tmp_path / "table.csv", rows=rows)
    assert forecast(csv, "--time", "date", "--horizon", 12, "--backbone", "none") == 2
    last = told()[1].splitlines()[-1]
    assert last.startswith(f"polyadapt: the table has {rows} rows: to fit and measure a horizon")
    assert "it needs 130" in last


def test_the_shortest_table_that_is_allowed_can_be_fitted(tmp_path: Path) -> None:
    series = read_table(table(tmp_path / "table.csv", rows=130), time="date")
    fit = fit_table(series, Plan(backbone=SMALL, horizon=12, windows=32, epochs=1))
    assert np.isfinite(fit.errors["One-for-All"].mse)


def test_a_fit_needs_a_horizon(tmp_path: Path, told: Told) -> None:
    assert forecast(table(tmp_path / "table.csv"), "--time", "date") == 2
    assert told()[1] == "polyadapt: --horizon STEPS is needed: how many rows to forecast\n"


def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(own_fit, "fit", interrupted)
    csv = table(tmp_path / "table.csv")
    places = {"--out": "o.csv", "--picture": "p.png", "--save": "s.safetensors"}
    words = [word for option, name in places.items() for word in (option, tmp_path / name)]
    assert forecast(csv, "--time", "date", "--horizon", 6, "--backbone", "none", *words) == 130
    assert told()[1].splitlines()[-1] == "polyadapt: interrupted"
    assert [*tmp_path.iterdir()] == [csv]


# Times and CSV


@pytest.mark.parametrize(
    ("last", "frequency", "later"),
    [
        ("2024-02-28", "D", ["2024-02-29", "2024-03-01"]),
        ("2024-01-31", "ME", ["2024-02-29", "2024-03-31"]),
        ("2024-11-01", "MS", ["2024-12-01", "2025-01-01"]),
        ("2024-01-05", "B", ["2024-01-08", "2024-01-09"]),
        ("2024-01-01", "QS-OCT", ["2024-04-01", "2024-07-01"]),
    ],
)
def test_times_go_on_at_the_step_of_the_calendar(
    last: str, frequency: str, later: list[str]
) -> None:
    series = Series(np.zeros((1, 1)), ("y",), np.array([last], "datetime64[ns]"), frequency)
    found = later_times(series, 2)
    assert found is not None
    assert [str(time)[:10] for time in found] == later


def test_a_single_time_has_no_step() -> None:
    series = Series(np.zeros((1, 1)), ("y",), np.array(["2024-01-01"], "datetime64[ns]"))
    with pytest.raises(AdaptError, match="name it with --frequency"):
        later_times(series, 1)


def test_numbers_in_csv_keep_eight_digits() -> None:
    outlook = Outlook(("y",), np.array([[1 / 3], [1e-7 / 3]]), None, first=1)
    assert as_csv({"a": outlook}, "row", "id") == "id,row,y\na,1,0.33333333\na,2,3.3333333e-08\n"


def _long(wide: Path, file: Path) -> Path:
    """The columns of a table below each other."""
    frame = pd.read_csv(wide).melt("date", var_name="shop", value_name="sold")
    frame.to_csv(file, index=False)
    return file


def _as_file(text: str, folder: Path) -> Path:
    file = folder / "printed.csv"
    file.write_text(text)
    return file


def test_the_aim_of_these_sets_is_what_the_tests_think_it_is() -> None:
    assert (FORECAST.loss, FORECAST.horizon) == ("mse", HORIZON)
