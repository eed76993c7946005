"""Tables with anomalies: windows that hold every row once, labels, and a real series."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyadapt.core import AdaptError
from polyadapt.timeseries.data_anomaly import AnomalyTable, tiled
from polyadapt.timeseries.metrics import areas, f1, point_adjusted


def save(path: Path, columns: dict[str, Any]) -> str:
    rows = zip(*columns.values(), strict=True)
    path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]))
    return str(path)


def tables(folder: Path, train: int = 50, test: int = 23, **settings: Any) -> AnomalyTable:
    """Rows count from 0; the test's rows 5 and 21 are anomalies; windows of 10."""
    labels = [int(row in (5, 21)) for row in range(test)]
    data = AnomalyTable(
        save(folder / "train.csv", {"at": range(train), "x": range(train)}),
        save(folder / "test.csv", {"at": range(test), "x": range(test), "odd": labels}),
        "odd",
        without=["at"],
        **settings,
    )
    data.look_back = 10
    return data


def rows_of(data: AnomalyTable, x: torch.Tensor) -> list[list[int]]:
    """Which rows of the table windows [b, L, 1] hold."""
    assert data.scaler is not None
    return np.rint(data.scaler.undo(x.double().numpy()))[..., 0].astype(int).tolist()  # type: ignore[no-any-return]


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 100))
def test_tiled_windows_hold_every_row(length: int, more: int) -> None:
    rows = length + more
    starts = tiled(rows, length)
    assert starts == sorted(set(starts))
    assert {start + step for start in starts for step in range(length)} == set(range(rows))
    assert len(starts) == -(-rows // length)


def test_every_row_of_the_test_counts_once_in_order(tmp_path: Path) -> None:
    data = tables(tmp_path, batch_size=2)
    data.setup()
    batches = list(data.test_dataloader())
    assert [x.shape for x, _ in batches] == [(2, 10, 1), (1, 10, 1)]
    rows = [row for x, _ in batches for window in rows_of(data, x) for row in window]
    labels = torch.cat([labels.flatten() for _, labels in batches])
    once = [(row, int(mark)) for row, mark in zip(rows, labels, strict=True) if mark >= 0]
    assert once == [(row, int(row in (5, 21))) for row in range(23)]
    assert (labels == -1).sum() == 7


def test_the_scaler_is_measured_on_the_rows_of_training_alone(tmp_path: Path) -> None:
    data = tables(tmp_path)
    data.setup()
    assert data.names == ("x",)
    assert data.scaler is not None
    assert data.scaler.mean == (19.5,)  # of 40 rows
    windows = data.stretches("train")
    assert len(windows) == 31
    assert rows_of(data, windows[30][0][None])[0] == list(range(30, 40))
    assert [rows_of(data, x) for (x,) in data.val_dataloader()] == [[list(range(40, 50))]]


def test_training_windows_are_shuffled_by_seed_and_a_step_apart(tmp_path: Path) -> None:
    def starts(**settings: Any) -> list[int]:
        data = tables(tmp_path, **settings)
        data.setup()
        return [rows_of(data, x)[0][0] for (x,) in data.train_dataloader()]

    assert starts(batch_size=1) == starts(batch_size=1)
    assert starts(batch_size=1) != starts(batch_size=1, seed=1)
    assert sorted(starts(batch_size=1, step=10)) == [0, 10, 20, 30]


def test_all_of_the_training_table_may_be_trained_on(tmp_path: Path) -> None:
    data = tables(tmp_path, val_share=0.0)
    data.setup()
    assert data.val_dataloader() == []
    assert len(data.stretches("train")) == 41


def test_arrays_and_a_file_of_labels_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", np.arange(60.0).reshape(30, 2))
    np.save(tmp_path / "test.npy", np.arange(40.0).reshape(20, 2))
    np.save(tmp_path / "labels.npy", np.arange(20) == 3)
    label_file = save(tmp_path / "labels.csv", {"at": range(20), "label": [*[0] * 19, 1]})
    for labels, place in ((str(tmp_path / "labels.npy"), 3), (label_file, 19)):
        data = AnomalyTable(str(tmp_path / "train.npy"), str(tmp_path / "test.npy"), labels)
        data.look_back = 20
        data.setup()
        x, found = next(iter(data.test_dataloader()))
        assert x.shape == (1, 20, 2)
        assert found[0].nonzero().flatten().tolist() == [place]


def test_in_the_real_series_of_aeon_one_hit_is_all_after_point_adjustment() -> None:
    found = find_spec("aeon")  # its wheel brings the file
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "datasets" / "data" / "KDD-TSAD_135"
    name = str(folder / "135_UCR_Anomaly_InternalBleeding16_{}.csv")
    train, test = name.format("TRAIN"), name.format("TEST")
    data = AnomalyTable(train, test, "is_anomaly", without=["timestamp"])
    data.setup()
    assert data.names == ("value",)
    assert [len(data.stretches(part)) for part in ("train", "val", "test")] == [861, 3, 76]
    labels = torch.cat([labels for _, labels in data.test_dataloader()])
    marked = labels[labels >= 0]
    assert len(marked) == 7501
    assert marked.nonzero().flatten().tolist() == list(range(4187, 4199))  # as its file says
    flagged = torch.arange(7501) == 4190
    assert f1(flagged, marked).f1 == 2 / 13
    assert f1(point_adjusted(flagged, marked), marked).f1 == 1
    assert areas(flagged.float(), marked).roc == pytest.approx((1 + 1 / 12) / 2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"step": 0}, "step=0, batch_size=128"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"val_share": 1.0}, "val_share=1 is not allowed"),
    ],
)
def test_settings_out_of_range_are_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(AdaptError, match=said):
        tables(tmp_path, **settings)


@pytest.mark.parametrize(
    ("test", "labels", "said"),
    [
        ({"x": [1, 2], "odd": [0, 2]}, "odd", "has the label 2: 1 is an anomaly, 0 is none"),
        ({"x": [1, 2], "odd": [0, 1]}, "label", "labels='label' is neither a file nor a column"),
        ({"y": [1, 2], "odd": [0, 1]}, "odd", "has the channels y, .* has x"),
        ({"x": [1, "a"], "odd": [0, 1]}, "odd", "column 'x', row 2: 'a' is not a number"),
        ({"x": ["", 1], "odd": [0, 1]}, "odd", "column 'x' begins without a value, row 1"),
        ({"x": ["a", "b"], "odd": [0, 1]}, "odd", r"row 1: without=\[x\] leaves it out"),
        ({"odd": [0, 1]}, "odd", "no column is left as a channel"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    tmp_path: Path, test: dict[str, Any], labels: str, said: str
) -> None:
    train = save(tmp_path / "train.csv", {"x": range(5)})
    with pytest.raises(AdaptError, match=said):
        AnomalyTable(train, save(tmp_path / "test.csv", test), labels).setup()


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data = tables(tmp_path)
    with pytest.raises(AdaptError, match=r"call setup\(\) first"):
        data.test_dataloader()
    data.setup()
    data.look_back = 30
    with pytest.raises(AdaptError, match="the test part has 23 rows, a window has 30"):
        data.test_dataloader()
    np.save(tmp_path / "labels.npy", np.zeros(7))
    (tmp_path / "bad.npy").write_bytes(b"no array")
    for labels, said in (
        ("labels.npy", "has 7 labels, the test has 23 rows"),
        ("bad.npy", "cannot"),
    ):
        data = tables(tmp_path)
        data.labels = str(tmp_path / labels)
        data.without = ("at", "odd")
        with pytest.raises(AdaptError, match=said):
            data.setup()
