"""Data modules of forecasting: the ETT protocol on its real file, order, subsets, refusals."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyadapt.core import AdaptError
from polyadapt.timeseries import data as modules
from polyadapt.timeseries.data import ETT, Benchmark, Published, SeriesData, TableData


def ready(data: SeriesData, look_back: int, horizon: int) -> SeriesData:
    data.look_back, data.horizon = look_back, horizon
    data.setup()
    return data


def small(path: Path, rows: int = 40, **settings: Any) -> SeriesData:
    """A table of two channels, x = row number and y = its negative, with windows of 3 + 2."""
    lines = ["x,y", *(f"{row},{-row}" for row in range(rows))]
    path.write_text("\n".join(lines))
    return ready(TableData(str(path), **settings), 3, 2)


def pasts(batches: Iterable[Any]) -> list[float]:
    """The first value of every window, in units of the table, rounded."""
    return [round(value, 4) for past, _ in batches for value in past[:, 0, 0].tolist()]


@pytest.fixture(scope="module")
def etth1(shared_data: Path) -> SeriesData:
    return ready(ETT(str(shared_data / "ETTh1.csv"), batch_size=2048), 336, 96)


def test_the_real_etth1_has_its_published_shape(etth1: SeriesData) -> None:
    assert etth1.series.values.shape == (17_420, 7)
    assert etth1.names[-1] == "OT"
    assert (etth1.frequency, etth1.period) == ("h", 24)
    sizes = [len(etth1.windows(part)) for part in ("train", "val", "test")]
    assert sizes == [7 * 8_209, 7 * 2_785, 7 * 2_785]
    own = etth1.series.values[:8640, -1]
    assert etth1.scaler.mean[-1] == pytest.approx(own.sum() / 8640, rel=1e-12)
    assert etth1.scaler.std[-1] == pytest.approx(
        np.sqrt((own - own.mean()) @ (own - own.mean()) / 8640)
    )


def test_last_value_and_seasonal_naive_score_on_all_of_etth1_as_known(etth1: SeriesData) -> None:
    last = season = count = 0.0
    for past, future in etth1.test_dataloader():
        last += (past[:, -1:] - future).double().square().sum().item()
        season += (past[:, -24:].repeat(1, 4, 1) - future).double().square().sum().item()
        count += future.numel()
    assert count == 7 * 2_785 * 96  # nothing dropped
    assert last / count == pytest.approx(1.294, abs=0.002)
    assert season / count == pytest.approx(0.512, abs=0.002)


def test_few_shots_of_etth1_keep_the_scaler_of_all_training_rows(
    etth1: SeriesData, shared_data: Path
) -> None:
    tenth = ready(ETT(str(shared_data / "ETTh1.csv"), few=0.05), 336, 96)
    assert tenth.scaler == etth1.scaler
    assert len(tenth.windows("train")) == 7 * (751 - 336 - 96 + 1)
    assert len(tenth.windows("test")) == len(etth1.windows("test"))
    tenth.horizon = 720
    with pytest.raises(AdaptError, match=r"train part has 751 rows with few=0.05, .* needs 1056"):
        tenth.train_dataloader()


def test_batches_are_scaled_and_the_last_one_is_short(tmp_path: Path) -> None:
    data = small(tmp_path / "t.csv", batch_size=16)  # 28 rows train, 4 validate, 8 test
    assert data.scaler.mean == (13.5, -13.5)
    batches = list(data.test_dataloader())
    assert [len(past) for past, _ in batches] == [14]  # 7 windows of 2 channels
    past, future = batches[0]
    assert past.dtype == torch.float32
    assert (past.shape, future.shape) == ((14, 3, 1), (14, 2, 1))
    first = data.scaler.undo(np.repeat(past[0].double().numpy(), 2, axis=1))[:, 0]
    assert first == pytest.approx([29, 30, 31], abs=1e-4)  # a look-back before row 32
    sizes = [len(past) for past, _ in small(tmp_path / "t.csv", batch_size=5).test_dataloader()]
    assert sizes == [5, 5, 4]


def test_training_windows_come_in_an_order_of_seed_and_epoch(tmp_path: Path) -> None:
    def order(seed: int, epoch: int) -> list[float]:
        loader = small(tmp_path / "t.csv", seed=seed).train_dataloader()
        sampler: Any = loader.sampler
        sampler.set_epoch(epoch)
        return pasts(loader)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(0, 0)), tuple(order(0, 1)), tuple(order(1, 0))}) == 3
    assert sorted(order(0, 0)) == sorted(order(1, 5))


def test_windows_per_epoch_are_one_choice_of_the_seed_in_every_epoch(tmp_path: Path) -> None:
    def chosen(seed: int, epoch: int, number: int = 10) -> list[float]:
        data = small(tmp_path / "t.csv", seed=seed, windows_per_epoch=number)
        loader = data.train_dataloader()
        sampler: Any = loader.sampler
        sampler.set_epoch(epoch)
        return pasts(loader)

    assert len(chosen(0, 0)) == 10
    assert chosen(0, 0) != chosen(0, 1)
    assert sorted(chosen(0, 0)) == sorted(chosen(0, 1))
    assert sorted(chosen(0, 0)) != sorted(chosen(1, 0))
    assert len(chosen(0, 0, number=10_000)) == 2 * 24  # no more than there are


def test_every_k_th_window_is_validated_and_all_are_tested(tmp_path: Path) -> None:
    data = small(tmp_path / "t.csv", 60, every=3)  # 6 rows validate: 5 windows of 2 channels
    assert [len(past) for past, _ in data.val_dataloader()] == [2 * 2]
    assert sum(len(past) for past, _ in data.test_dataloader()) == 2 * 11


def test_joint_windows_and_windows_without_a_future(tmp_path: Path) -> None:
    data = small(tmp_path / "t.csv", joint=True)
    assert [past.shape for past, _ in data.test_dataloader()] == [(7, 3, 2)]
    data.horizon = 0
    assert [future.shape for _, future in data.test_dataloader()] == [(9, 0, 2)]


def test_a_table_may_have_no_validation(tmp_path: Path) -> None:
    data = small(tmp_path / "t.csv", train_share=0.8, test_share=0.2)
    assert data.val_dataloader() == []
    assert len(data.windows("train")) == 2 * 28


def test_series_of_a_long_table_become_channels(tmp_path: Path) -> None:
    rows = [
        f"{day},{shop},{day * sign}" for day in range(40) for shop, sign in (("a", 1), ("b", -1))
    ]
    (tmp_path / "long.csv").write_text("\n".join(["day,shop,sold", *rows]))
    data = TableData(str(tmp_path / "long.csv"), id="shop", columns=["sold"])
    ready(data, 3, 2)
    assert data.names == ("a", "b")
    assert data.series.values[7].tolist() == [7, -7]


def test_how_a_table_is_read_can_be_set(tmp_path: Path) -> None:
    days = [f"{day:02}.01.2020,{day if day != 5 else ''}" for day in range(1, 32) if day != 6]
    (tmp_path / "t.csv").write_text("\n".join(["day,x", *days]))
    how: dict[str, Any] = {"time": "day", "time_format": "%d.%m.%Y", "missing": "interpolate"}
    data = ready(TableData(str(tmp_path / "t.csv"), **how), 3, 2)
    assert data.series.values.ravel() == pytest.approx(range(1, 32))
    assert (data.frequency, data.period) == ("D", 7)
    with pytest.raises(AdaptError, match="no value in rows 5 to 6: a run of 2, up to 1 are filled"):
        TableData(str(tmp_path / "t.csv"), longest=1, **how).setup()


def test_a_constant_channel_is_zero_and_finite(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x\n" + "0.1\n" * 40)
    data = ready(TableData(str(tmp_path / "t.csv")), 3, 2)
    assert all(not past.any() and not future.any() for past, future in data.test_dataloader())


def standard(path: Path, rows: int, step: str = "D") -> str:
    """A benchmark's file with its target in the middle."""
    import pandas as pd

    stamps = pd.date_range("2020-01-01", periods=rows, freq=step)
    frame = pd.DataFrame({"date": stamps, "a": range(rows), "OT": 1.0, "b": 2.0})
    frame.to_csv(path, index=False)
    return str(path)


def test_a_benchmark_has_its_target_last_and_rows_for_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(modules.BENCHMARKS, "Weather", Published(50, 3, "10min"))
    data = ready(Benchmark("Weather", standard(tmp_path / "w.csv", 50)), 4, 1)
    assert data.names == ("a", "b", "OT")
    assert data.period == 144
    assert [len(data.windows(part)) // 3 for part in ("train", "val", "test")] == [31, 5, 10]


def test_a_file_of_another_size_is_no_benchmark(tmp_path: Path) -> None:
    path = standard(tmp_path / "w.csv", 50)
    with pytest.raises(AdaptError, match="50 rows of 3 channels, ILI has 966 of 7"):
        Benchmark("ILI", path).setup()
    with pytest.raises(AdaptError, match="there is no benchmark 'Wether': Weather, Electricity"):
        Benchmark("Wether", path)


def test_ett_tells_hours_from_quarters_and_refuses_days(tmp_path: Path) -> None:
    quarters = ready(ETT(standard(tmp_path / "m.csv", 57_600, "15min")), 512, 96)
    assert [len(quarters.windows(part)) // 3 for part in ("train", "val")] == [33_953, 11_425]
    assert quarters.period == 96
    with pytest.raises(AdaptError, match="a row every D, ETT's are h or 15min apart"):
        ETT(standard(tmp_path / "d.csv", 50)).setup()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 0}, "batch_size=0 is not allowed: a whole number from 1"),
        ({"windows_per_epoch": 0}, "windows_per_epoch=0"),
        ({"every": 0}, "every=0"),
        ({"num_workers": -1}, "num_workers=-1 is not allowed: a whole number from 0"),
        ({"few": 0.0}, "few=0 is not allowed: a share above 0"),
        ({"train_share": 0.9}, "train=0.9, test=0.2"),
        ({"columns": ["z"]}, "there is no column 'z': x, y"),
    ],
)
def test_settings_out_of_range_are_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(AdaptError, match=said):
        small(tmp_path / "t.csv", **settings)


def test_a_table_too_short_for_a_window_says_so(tmp_path: Path) -> None:
    data = small(tmp_path / "t.csv", rows=20)
    data.look_back, data.horizon = 10, 30
    with pytest.raises(
        AdaptError,
        match="test part has 14 rows, and a window of look_back=10 and horizon=30 needs 40",
    ):
        data.test_dataloader()
    with pytest.raises(AdaptError, match="no row of 1 is for training"):
        small(tmp_path / "t.csv", rows=1)


def test_what_comes_too_early_is_refused(tmp_path: Path) -> None:
    data = small(tmp_path / "t.csv")
    with pytest.raises(AdaptError, match=r"call setup\(\) first"):
        _ = TableData(str(tmp_path / "t.csv")).names
    data.horizon = None
    with pytest.raises(AdaptError, match=r"set data\.look_back and data.horizon first"):
        data.train_dataloader()
