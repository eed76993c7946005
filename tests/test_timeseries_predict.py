"""`polyadapt timeseries predict`: what it says of a table, by the aim of the set."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from polyadapt.core import AdaptError
from polyadapt.core.cli import main
from polyadapt.tests.timeseries_sets import (
    HORIZON,
    LOOK_BACK,
    NAMES,
    SCALER,
    TINY,
    saved_set,
    table,
)
from polyadapt.timeseries.aims import Classify, Forecast, Impute, Reconstruct
from polyadapt.timeseries.backtest import backtest
from polyadapt.timeseries.forecaster import Forecaster
from polyadapt.timeseries.tables import read_table
from polyadapt.timeseries.task import SeriesTask
from polyadapt.timeseries.windowed import tiles

Told = Callable[[], tuple[str, str]]
CLASSES = Classify(classes=("calm", "storm"), channels=2)


def predict(*words: object) -> int:
    return main(["timeseries", "predict", *map(str, words)])


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    return lambda: tuple(capsys.readouterr())  # type: ignore[return-value]


def _frame(text: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(text))


def _scaled(values: pd.DataFrame) -> torch.Tensor:
    return torch.from_numpy(SCALER.apply(values[list(NAMES)].to_numpy())).float()


# Forecasts


def test_forecasts_of_the_last_rows_stand_beside_what_came(tmp_path: Path, told: Told) -> None:
    file, csv = saved_set(tmp_path / "set.safetensors", backbone=TINY), table(tmp_path / "t.csv")
    assert predict(csv, "--time", "date", "--set", file, "--share", 0.3) == 0
    out, said = told()
    found, whole = _frame(out), pd.read_csv(csv)
    assert list(found.columns) == ["made", "date", "column", "forecast", "truth"]
    assert len(found) == 2 * HORIZON * 2  # 60 of 200 rows hold two windows of 24
    first = found[(found["made"] == "2024-01-06 19:00:00") & (found["column"] == "OT")]
    assert first["date"].tolist() == whole["date"][140:164].tolist()
    np.testing.assert_allclose(first["truth"], whole["OT"][140:164])
    with torch.no_grad():
        task = SeriesTask.from_file(file).eval()
        wanted = SCALER.undo(task(_scaled(whole[92:140])[None])[0].double().numpy())
    np.testing.assert_allclose(first["forecast"], wanted[:, 1], rtol=1e-6)
    lines = said.splitlines()
    assert lines[0] == "2 windows of 24 rows, scaled columns"
    errors = (found["forecast"] - found["truth"]).to_numpy().reshape(-1, 2) / SCALER.std
    assert (
        lines[1] == f"the set          MSE {(errors**2).mean():.4f}  MAE {abs(errors).mean():.4f}"
    )
    assert lines[3] == "seasonal naive   MSE 0.0000  MAE 0.0000"  # daily waves without noise


def test_every_row_can_have_its_forecast_and_each_sees_the_past_alone(tmp_path: Path) -> None:
    forecaster = Forecaster.from_file(saved_set(tmp_path / "set.safetensors"))
    series = read_table(table(tmp_path / "t.csv"), time="date")
    found = backtest(forecaster, series, share=1, every=1)
    assert found.starts == list(range(LOOK_BACK, 200 - HORIZON + 1))
    series.values[150:] = 99.0
    changed = backtest(forecaster, series, share=1, every=1)
    same = (found.forecasts == changed.forecasts).all(axis=(1, 2))
    assert same.tolist() == [start <= 150 for start in found.starts]


def test_quantiles_have_a_column_for_each_level(tmp_path: Path, told: Told) -> None:
    aim = Forecast(horizon=HORIZON, loss="quantile", levels=(0.1, 0.5, 0.9))
    file = saved_set(tmp_path / "set.safetensors", aim=aim)
    assert predict(table(tmp_path / "t.csv"), "--time", "date", "--set", file) == 0
    found = _frame(told()[0])
    assert list(found.columns[3:]) == ["q0.1", "q0.5", "q0.9", "truth"]


@pytest.mark.parametrize(
    ("share", "every", "said"),
    [
        (0.0, None, "share=0 is not allowed"),
        (1.5, None, "share=1.5 is not allowed"),
        (0.5, 0, "every=0 is not allowed"),
        (0.1, None, "200 rows, 20 of them to forecast: a window of .* is 48 and 24 rows"),
    ],
)
def test_a_backtest_without_a_window_is_refused(
    share: float, every: int | None, said: str, tmp_path: Path
) -> None:
    forecaster = Forecaster.from_file(saved_set(tmp_path / "set.safetensors"))
    series = read_table(table(tmp_path / "t.csv"), time="date")
    with pytest.raises(AdaptError, match=said):
        backtest(forecaster, series, share, every)


def test_a_table_is_read_as_for_a_forecast(tmp_path: Path, told: Told) -> None:
    file, csv = saved_set(tmp_path / "set.safetensors"), table(tmp_path / "t.csv")
    frame = pd.read_csv(csv, parse_dates=["date"])
    frame["date"] = frame["date"].dt.strftime("%d.%m.%Y %H:%M")
    frame.drop(index=20).to_csv(csv, index=False)
    form = ["--time", "date", "--time-format", "%d.%m.%Y %H:%M", "--set", file, "--share", 0.3]
    assert predict(csv, *form) == 2
    assert "missing=interpolate or last" in told()[1]
    assert predict(csv, *form, "--missing", "interpolate") == 0
    assert _frame(told()[0])["date"].iloc[0] == "2024-01-06 20:00:00"  # row 141 of 200


def test_series_below_each_other_are_the_columns_of_a_set(tmp_path: Path, told: Told) -> None:
    csv = table(tmp_path / "t.csv")
    wide = saved_set(tmp_path / "set.safetensors")
    words = ["--time", "date", "--set", wide, "--share", 0.3]
    assert predict(csv, *words) == 0
    wanted = told()[0]
    long = pd.read_csv(csv).melt("date", var_name="what", value_name="value")
    long.to_csv(csv, index=False)
    assert predict(csv, *words, "--id", "what") == 0
    assert told()[0] == wanted
    alone = saved_set(tmp_path / "alone", names=None, scaler=None)
    assert predict(csv, "--time", "date", "--set", alone, "--id", "what") == 2
    assert f"{alone} takes series one by one, {csv} has 2" in told()[1]


# Gaps


def test_gaps_are_filled_and_all_else_stays(tmp_path: Path, told: Told) -> None:
    file, csv = saved_set(tmp_path / "set.safetensors", aim=Impute()), table(tmp_path / "t.csv")
    whole = pd.read_csv(csv).assign(note="as it was")
    gaps = whole.copy()
    gaps.loc[[5, 6, 120], "load"] = np.nan
    gaps.loc[199, "OT"] = np.nan
    gaps.to_csv(csv, index=False)
    assert predict(csv, "--set", file, "--out", tmp_path / "out.csv") == 0
    assert told() == ("", "4 values are filled\n")
    found = pd.read_csv(tmp_path / "out.csv")
    pd.testing.assert_frame_equal(found[gaps.notna()], whole[gaps.notna()])
    assert found.notna().all(axis=None)
    window = _scaled(gaps[:LOOK_BACK])
    with torch.no_grad():
        task = SeriesTask.from_file(file).eval()
        known = ~window.isnan()
        answer = task(window.nan_to_num()[None], known[None])[0].double().numpy()
    wanted = SCALER.undo(answer)[[5, 6], 0]
    np.testing.assert_allclose(found["load"][[5, 6]], wanted, rtol=1e-6)


def test_a_table_without_gaps_stays_as_it_is(tmp_path: Path, told: Told) -> None:
    file, csv = saved_set(tmp_path / "set.safetensors", aim=Impute()), table(tmp_path / "t.csv")
    assert predict(csv, "--set", file) == 0
    out, said = told()
    pd.testing.assert_frame_equal(_frame(out), pd.read_csv(csv))
    assert said == "0 values are filled\n"


def test_a_gap_as_long_as_a_window_is_refused(tmp_path: Path, told: Told) -> None:
    file, csv = saved_set(tmp_path / "set.safetensors", aim=Impute()), table(tmp_path / "t.csv")
    gaps = pd.read_csv(csv)
    gaps.loc[40:100, "load"] = np.nan
    gaps.to_csv(csv, index=False)
    assert predict(csv, "--set", file) == 2
    assert "a column has no value in rows 49 to 96: a window of 48 rows needs one" in told()[1]


def test_rows_that_are_missing_are_filled_where_times_tell_of_them(
    tmp_path: Path, told: Told
) -> None:
    file, csv = saved_set(tmp_path / "set.safetensors", aim=Impute()), table(tmp_path / "t.csv")
    whole = pd.read_csv(csv).assign(note="as it was")
    whole.drop(index=[50, 51]).to_csv(csv, index=False)
    assert predict(csv, "--set", file, "--time", "date", "--out", tmp_path / "out.csv") == 0
    assert told() == ("", "4 values are filled\n")
    found = pd.read_csv(tmp_path / "out.csv")
    assert found["date"].tolist() == whole["date"].tolist()
    pd.testing.assert_frame_equal(found.drop(index=[50, 51]), whole.drop(index=[50, 51]))
    assert found[list(NAMES)].notna().all(axis=None)
    assert found["note"][[50, 51]].isna().all(), "only channels are filled"


@pytest.mark.parametrize("aim", [Impute(), Reconstruct()], ids=["Impute", "Reconstruct"])
def test_times_that_are_not_steps_are_refused_whatever_the_aim(
    aim: Impute | Reconstruct, tmp_path: Path, told: Told
) -> None:
    file, csv = saved_set(tmp_path / "set.safetensors", aim=aim), table(tmp_path / "t.csv")
    whole, words = pd.read_csv(csv), ["--set", file, "--time", "date"]
    whole.iloc[[1, 0, *range(2, 200)]].to_csv(csv, index=False)
    assert predict(csv, *words) == 2
    assert "row 2 of 2024-01-01 follows 2024-01-01 01:00:00: sort the rows" in told()[1]
    whole.iloc[[0, 0, *range(1, 200)]].to_csv(csv, index=False)
    assert predict(csv, *words) == 2
    assert "rows 1 and 2 are both of 2024-01-01" in told()[1]
    assert predict(table(csv, freq="D"), *words) == 2
    assert f"a row every D, {file} was trained on rows every h" in told()[1]
    assert predict(csv, "--set", file, "--time", "when") == 2
    assert told()[1] == f"polyadapt: {csv}: there is no column 'when': date, load, OT\n"


# Anomalies


def test_scores_of_rows_are_those_of_the_windows_that_cover_them(
    tmp_path: Path, told: Told
) -> None:
    file, csv = saved_set(tmp_path / "s", aim=Reconstruct()), table(tmp_path / "t.csv", rows=100)
    assert predict(csv, "--set", file, "--time", "date") == 0
    out, said = told()
    found, whole = _frame(out), pd.read_csv(csv)
    assert list(found.columns) == ["date", "score"]
    assert "--normal TABLE tells from where on is odd" in said
    windows = torch.stack([_scaled(whole[at : at + LOOK_BACK]) for at in (0, 48, 52)])
    with torch.no_grad():
        task = SeriesTask.from_file(file).eval()
        scores = (task(windows) - windows).square().mean(-1)
    wanted = torch.cat([scores[0], scores[1], scores[2][-4:]])
    np.testing.assert_allclose(found["score"], wanted.numpy(), rtol=1e-4)


def test_a_table_of_normal_rows_makes_the_threshold(tmp_path: Path, told: Told) -> None:
    file = saved_set(tmp_path / "s", aim=Reconstruct(share=0.01))
    usual, csv = table(tmp_path / "usual.csv"), table(tmp_path / "t.csv")
    noisy, odd = pd.read_csv(usual), pd.read_csv(csv)
    noisy["OT"] += np.random.default_rng(0).normal(size=200)  # no two windows are the same
    noisy.to_csv(usual, index=False)
    odd.loc[77, "load"] = 1000.0
    odd.to_csv(csv, index=False)
    assert predict(csv, "--set", file, "--normal", usual) == 0
    out, said = told()
    found = _frame(out)
    assert list(found.columns) == ["score", "anomaly"]
    assert found["anomaly"][77] == 1
    assert int(said.partition(" rows above")[0]) == found["anomaly"].sum()
    assert predict(usual, "--set", file, "--normal", usual) == 0
    assert _frame(told()[0])["anomaly"].sum() == 2  # 1 % of 200


def test_missing_values_cannot_be_judged(tmp_path: Path, told: Told) -> None:
    file, csv = saved_set(tmp_path / "s", aim=Reconstruct()), table(tmp_path / "t.csv")
    gaps = pd.read_csv(csv)
    gaps.loc[7, "OT"] = np.nan
    gaps.to_csv(csv, index=False)
    assert predict(csv, "--set", file) == 2
    assert "column 'OT' has no value in row 8: missing=interpolate or last fills it" in told()[1]
    assert predict(csv, "--set", file, "--missing", "last") == 0
    assert _frame(told()[0])["score"].notna().all()


# Classes


def test_each_series_gets_its_class_and_a_short_one_is_lengthened(
    tmp_path: Path, told: Told
) -> None:
    file = saved_set(tmp_path / "s", aim=CLASSES)
    rows = pd.read_csv(table(tmp_path / "t.csv", rows=LOOK_BACK + 40))
    rows["day"] = ["first"] * LOOK_BACK + ["second"] * 40
    rows.to_csv(tmp_path / "t.csv", index=False)
    assert predict(tmp_path / "t.csv", "--set", file, "--id", "day") == 0
    out, said = told()
    found = _frame(out)
    assert said == "2 series of up to 48 rows\n"
    assert found["day"].tolist() == ["first", "second"]
    second = _scaled(rows[LOOK_BACK:])
    windows = torch.stack(
        [_scaled(rows[:LOOK_BACK]), torch.cat([second, second[-1:].repeat(8, 1)])]
    )
    with torch.no_grad():
        chances = SeriesTask.from_file(file).eval()(windows).softmax(-1)
    assert found["class"].tolist() == [CLASSES.classes[at] for at in chances.argmax(-1)]
    np.testing.assert_allclose(found["probability"], chances.amax(-1).numpy(), rtol=1e-5)


def test_a_series_longer_than_a_window_has_no_one_class(tmp_path: Path, told: Told) -> None:
    file = saved_set(tmp_path / "s", aim=CLASSES)
    assert predict(table(tmp_path / "t.csv", rows=49), "--set", file) == 2
    assert "49 rows, 0 values missing: up to 48 rows and none" in told()[1]


# What does not fit


@pytest.mark.parametrize(
    ("aim", "words", "said"),
    [
        (Forecast(horizon=HORIZON), ["--normal", "t.csv"], "--normal does nothing with "),
        (Impute(), ["--missing", "last"], "takes --columns, --time, --time-format, --frequency\n"),
        (Reconstruct(), ["--share", "0.1"], "which was trained to Reconstruct; it takes"),
        (CLASSES, ["--time", "date"], "which was trained to Classify; it takes --columns, --id\n"),
    ],
    ids=["Forecast", "Impute", "Reconstruct", "Classify"],
)
def test_a_word_that_an_aim_does_not_use_is_refused(
    aim: Forecast | Impute | Reconstruct | Classify,
    words: list[str],
    said: str,
    tmp_path: Path,
    told: Told,
) -> None:
    file, csv = saved_set(tmp_path / "s", aim=aim), table(tmp_path / "t.csv")
    assert predict(csv, "--set", file, *words) == 2
    assert said in told()[1]


def test_other_columns_are_refused_and_can_be_chosen(tmp_path: Path, told: Told) -> None:
    file = saved_set(tmp_path / "s", aim=Reconstruct())
    csv = table(tmp_path / "t.csv", columns=("a", "b", "c"))
    assert predict(csv, "--set", file) == 2
    assert "was trained on 2 columns (load, OT)" in told()[1]
    assert predict(csv, "--set", file, "--columns", "a") == 2
    assert told()[1] == f"polyadapt: 1 column named, {file} was trained on 2\n"
    assert predict(csv, "--set", file, "--columns", "a", "a") == 2
    assert told()[1] == f"polyadapt: {csv}: the column 'a' is named twice\n"
    assert predict(csv, "--set", file, "--columns", "a", "c") == 0


def test_a_set_without_names_needs_them(tmp_path: Path, told: Told) -> None:
    file = saved_set(tmp_path / "s", aim=Reconstruct(), names=None, scaler=None)
    csv = table(tmp_path / "t.csv")
    assert predict(csv, "--set", file) == 2
    assert told()[1] == f"polyadapt: {file} names no columns: name them with --columns\n"
    assert predict(csv, "--set", file, "--columns", "load") == 0


def test_a_table_shorter_than_a_window_is_refused(tmp_path: Path, told: Told) -> None:
    file, csv = saved_set(tmp_path / "s", aim=Reconstruct()), table(tmp_path / "t.csv", rows=47)
    assert predict(csv, "--set", file) == 2
    assert told()[1] == f"polyadapt: {csv} has 47 rows: a window of the set has 48\n"


def test_windows_cover_every_row_once() -> None:
    for rows in range(5, 30):
        covered = [
            row for first, new in tiles(rows, 5) for row in range(first + 5 - new, first + 5)
        ]
        assert covered == list(range(rows))
