"""M4 and M3: their files, one window per series and epoch, and the scores of a competition."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyadapt.core import AdaptError
from polyadapt.timeseries.competition import (
    M3_COUNTS,
    M3_RULES,
    M4_RULES,
    Archive,
    is_whole_m4,
    read_forecasts,
    read_m4,
    read_tsf,
)
from polyadapt.timeseries.data_competition import M3, M4, CompetitionData, Scores


def save_m4(folder: Path, past: dict[str, list[Any]], future: dict[str, list[Any]]) -> str:
    """Yearly-train.csv and -test.csv as the organisers write them: quoted, filled with blanks."""
    for part, series in (("Train", past), ("Test", future)):
        (folder / part).mkdir(exist_ok=True)
        width = max(map(len, series.values()))
        lines = [",".join(f'"V{number + 1}"' for number in range(width + 1))]
        for name, values in series.items():
            cells = [f'"{name}"', *map(str, values), *[""] * (width - len(values))]
            lines.append(",".join(cells))
        (folder / part / f"Yearly-{part.lower()}.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


def yearly(folder: Path, series: int = 20, **settings: Any) -> CompetitionData:
    """Series s counts 100 s, 100 s + 1, ...: 20 + s rows, then 6 of the test."""
    past: dict[str, list[Any]] = {
        f"Y{s}": [100 * s + row for row in range(20 + s)] for s in range(series)
    }
    future: dict[str, list[Any]] = {
        f"Y{s}": [100 * s + row for row in range(20 + s, 26 + s)] for s in range(series)
    }
    data = M4(save_m4(folder, past, future), "Yearly", **settings)
    data.look_back, data.horizon = 12, 6
    data.setup()
    return data


def save_tsf(path: Path, *lines: str, horizon: str = "@horizon 2") -> str:
    head = ["# a comment", "@relation t", "@attribute series_name string"]
    head += ["@attribute start_timestamp date", "@frequency yearly", horizon, "@missing true"]
    path.write_text("\n".join([*head, "@data", *lines]), encoding="cp1252")
    return str(path)


def test_the_rules_of_m4_and_m3_are_the_published_ones() -> None:
    assert [rules.horizon for rules in M4_RULES.values()] == [6, 8, 18, 13, 14, 48]
    assert [rules.period for rules in M4_RULES.values()] == [1, 4, 12, 1, 1, 24]
    assert [rules.history for rules in M4_RULES.values()] == [1.5, 1.5, 1.5, 10, 10, 10]
    assert [rules.horizon for rules in M3_RULES.values()] == [6, 8, 18, 8]
    assert sum(M3_COUNTS.values()) == 3_003


def test_m4_is_read_as_its_organisers_wrote_it(tmp_path: Path) -> None:
    future = {"Y2": [9] * 6, "Y1": [8] * 6}
    contest = read_m4(save_m4(tmp_path, {"Y1": [1.5, 2, 3], "Y2": [4]}, future), "Yearly")
    assert contest.names == ("Y1", "Y2")
    assert [values.tolist() for values in contest.pasts] == [[1.5, 2, 3], [4]]
    assert [values[0] for values in contest.futures] == [8, 9]
    assert not is_whole_m4(contest, "Yearly")
    for part in ("Train", "Test"):
        file = tmp_path / part / f"Yearly-{part.lower()}.csv"
        file.rename(tmp_path / file.name)
    assert read_m4(tmp_path, "Yearly").names == ("Y1", "Y2")


def test_the_test_of_m4_is_the_end_of_every_past_and_what_came_then(tmp_path: Path) -> None:
    data = yearly(tmp_path, batch_size=8)
    batches = list(data.test_dataloader())
    assert [len(past) for past, _ in batches] == [8, 8, 4]
    past, future = batches[0]
    assert (past.shape, future.shape, past.dtype) == ((8, 12, 1), (8, 6, 1), torch.float32)
    assert past[3, :, 0].tolist() == [300 + row for row in range(23 - 12, 23)]
    assert future[3, :, 0].tolist() == [300 + row for row in range(23, 29)]
    assert (data.period, data.scaler) == (1, None)


def test_a_past_shorter_than_the_look_back_begins_with_its_first_value(tmp_path: Path) -> None:
    data = yearly(tmp_path)
    data.look_back = 24
    past, _ = next(iter(data.test_dataloader()))
    assert past[0, :, 0].tolist() == [0] * 4 + list(range(20))


def drawn(data: CompetitionData, epoch: int) -> torch.Tensor:
    """[series, L + T] of one epoch, by series."""
    loader = data.train_dataloader()
    sampler: Any = loader.sampler
    sampler.set_epoch(epoch)
    whole = torch.cat([torch.cat([past, future], dim=1)[..., 0] for past, future in loader])
    return whole[whole[:, -1].argsort()]


def test_an_epoch_has_one_window_of_every_series_drawn_by_seed_and_epoch(tmp_path: Path) -> None:
    data = yearly(tmp_path)
    first = drawn(data, 0)
    assert len(first) == 18  # 20 but a tenth for validation
    assert torch.equal(first, drawn(yearly(tmp_path), 0))
    assert not torch.equal(first, drawn(data, 1))
    assert not torch.equal(first, drawn(yearly(tmp_path, seed=1), 0))
    assert (first.diff(dim=1)[:, 11:] == 1).all()  # what follows the past is its continuation


def test_training_draws_from_the_last_one_and_a_half_horizons(tmp_path: Path) -> None:
    data = yearly(tmp_path, val_share=0.0)
    cuts = {
        int(window[12] % 100) - int(window[-7] // 100) - 20  # 0: the first row after the past
        for epoch in range(20)
        for window in drawn(data, epoch)
    }
    assert cuts == {-9, -8, -7, -6}
    assert data.val_dataloader() == []
    wide = yearly(tmp_path, val_share=0.0, history=3.0)
    assert min(window[12] % 100 - window[-7] // 100 for window in drawn(wide, 0)) < 20 - 9


def test_validation_takes_the_end_of_series_that_training_does_not_see(tmp_path: Path) -> None:
    data = yearly(tmp_path, val_share=0.2)
    held = {int(future[-1, 0] // 100) for _, futures in data.val_dataloader() for future in futures}
    trained = {int(window[-1] // 100) for window in drawn(data, 0)}
    assert len(held) == 4
    assert held | trained == set(range(20))
    assert not held & trained
    past, future = next(iter(data.val_dataloader()))
    s = int(past[0, 0, 0] // 100)
    assert future[0, :, 0].tolist() == [100 * s + row for row in range(14 + s, 20 + s)]


def test_scores_are_means_over_series(tmp_path: Path) -> None:
    past, future = {"Y1": [1, 2, 4, 7], "Y2": [5, 5]}, {"Y1": [9] * 6, "Y2": [5] * 6}
    data = M4(save_m4(tmp_path, past, future), "Yearly")
    data.setup()
    last_value = np.repeat([[7.0], [5.0]], 6, axis=1)
    expected = Scores(smape=(200 * 2 / 16 + 0) / 2, mase=2 / 2, owa=1.0)  # Y2 never moved: no MASE
    assert data.scores(last_value) == expected  # for a season of one row, this is Naive2
    longer = np.concatenate([last_value, np.full((2, 3), 1e6)], axis=1)
    assert data.scores(longer) == expected
    twice = np.repeat([[5.0], [5.0]], 6, axis=1)  # 4 off where Naive2 is 2 off
    assert data.scores(twice).owa == pytest.approx((200 * 4 / 14 / 25 + 2) / 2)
    assert data.scores(twice, naive2_forecasts=twice).owa == 1
    with pytest.raises(AdaptError, match=r"forecasts \[1, 6\]: there are 2 series"):
        data.scores(last_value[:1])
    with pytest.raises(AdaptError, match="forecasts of 5 steps: the competition asks for 6"):
        data.scores(last_value[:, :5])


def test_a_submission_is_read_in_the_order_of_the_series(tmp_path: Path) -> None:
    future = {"Y1": [1] * 6, "Y2": [2] * 6}
    contest = read_m4(save_m4(tmp_path, {"Y1": [1], "Y2": [2]}, future), "Yearly")
    path = tmp_path / "submission-Naive2.csv"
    path.write_text("id,F1,F2\nY2,5,6\nY1,3,4\n")
    assert read_forecasts(path, contest).tolist() == [[3, 4], [5, 6]]
    for text, said in (
        ("id,F1\nY2,5\n", "has no series 'Y1'"),
        ("id,F1,F2\nY2,5,6\nY1,3,\n", "forecasts have 1 to 2 steps"),
    ):
        path.write_text(text)
        with pytest.raises(AdaptError, match=said):
            read_forecasts(path, contest)
    with pytest.raises(AdaptError, match="there is no file"):
        read_forecasts(tmp_path / "none.csv", contest)


def test_a_monash_file_is_read(tmp_path: Path) -> None:
    path = save_tsf(tmp_path / "t.tsf", "Zürich:1990-01-01 00-00-00:1,2.5,?,4", "T2:1991:5")
    archive = read_tsf(path)
    assert isinstance(archive, Archive)
    assert (archive.frequency, archive.horizon) == ("yearly", 2)
    assert list(archive.series) == ["Zürich", "T2"]
    assert np.isnan(archive.series["Zürich"]).tolist() == [False, False, True, False]


def test_m3_takes_the_last_values_for_the_test_and_fills_missing_ones_where_asked(
    tmp_path: Path,
) -> None:
    path = save_tsf(tmp_path / "t.tsf", "T1:1990:1,?,3,4,5")
    data = M3(path, missing="interpolate")
    data.look_back, data.horizon = 3, 2
    data.setup()
    assert (data.contest.pasts[0].tolist(), data.contest.futures[0].tolist()) == ([1, 2, 3], [4, 5])
    with pytest.raises(AdaptError, match="series 'T1', column 'value' has no value in row 2"):
        M3(path).setup()
    assert (
        M3(save_tsf(tmp_path / "u.tsf", "T:1:" + "1," * 9 + "1", horizon="")).read()[1].horizon == 6
    )


def test_the_real_m1_yearly_set_is_read() -> None:
    found = find_spec("aeon")  # its wheel brings the file
    assert found is not None
    assert found.origin is not None
    name = "m1_yearly_dataset"
    data = M3(str(Path(found.origin).parent / "datasets" / "data" / name / f"{name}.tsf"))
    data.look_back, data.horizon = 9, 6
    data.setup()
    assert len(data.contest.names) == 181
    assert data.contest.pasts[0][:3].tolist() == [3600, 7700, 12300]
    assert data.contest.futures[0].tolist()[-1] == 1_425_090
    assert sum(len(past) for past, _ in data.test_dataloader()) == 181
    assert sum(len(past) for past, _ in data.train_dataloader()) == 181 - 18
    flat = np.stack([np.repeat(past[-1], 6) for past in data.contest.pasts])
    assert data.scores(flat).mase > 1  # further ahead than the one step it is measured by


@pytest.mark.parametrize(
    ("past", "future", "said"),
    [
        ({"Y1": [1, "x", 3]}, {"Y1": [1] * 6}, "series 'Y1', value 2: 'x' is not a number"),
        ({"Y1": [1, "", 3]}, {"Y1": [1] * 6}, "series 'Y1', value 2: '' is not a number"),
        ({"Y1": []}, {"Y1": [1] * 6}, "series 'Y1' has no value"),
        ({"Y1": [1]}, {"Y2": [1] * 6}, "has no series 'Y1'"),
        ({"Y1": [1]}, {"Y1": [1] * 5}, "series 'Y1': 5 values, Yearly has 6"),
    ],
)
def test_m4_files_that_are_wrong_are_refused(
    tmp_path: Path, past: dict[str, Any], future: dict[str, Any], said: str
) -> None:
    with pytest.raises(AdaptError, match=said):
        read_m4(save_m4(tmp_path, past, future), "Yearly")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no series behind @data"),
        ("@attribute name string\n@data\n", "no series behind @data"),
        (
            "@attribute name string\n@data\nT1:1990:1,2",
            "line 3: 2 attributes before the values, not 1",
        ),
        ("@attribute name string\n@data\nT1:1,two", "line 3, series 'T1', value 2: 'two' is not"),
    ],
)
def test_tsf_files_that_are_wrong_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "t.tsf").write_text(text)
    with pytest.raises(AdaptError, match=said):
        read_tsf(tmp_path / "t.tsf")


def test_what_a_competition_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdaptError, match="M4 has no frequency 'yearly': Yearly, Quarterly"):
        M4(str(tmp_path), "yearly")
    with pytest.raises(AdaptError, match=r"there is no file Hourly-train\.csv in"):
        read_m4(tmp_path, "Hourly")
    with pytest.raises(AdaptError, match="M3 has no group 'Y': Yearly"):
        M3("t.tsf", "Y")
    with pytest.raises(AdaptError, match="there is no file"):
        read_tsf(tmp_path / "none.tsf")
    path = save_tsf(tmp_path / "t.tsf", "T1:1990:1,2")
    with pytest.raises(AdaptError, match="series 'T1' has no row before its test"):
        M3(path).setup()
    (tmp_path / "w.tsf").write_text("@attribute a string\n@frequency weekly\n@data\nT:1,2,3")
    with pytest.raises(AdaptError, match="is of @frequency Weekly: say the group"):
        M3(str(tmp_path / "w.tsf")).setup()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"val_share": 1.0}, "val_share=1 is not allowed"),
        ({"history": 0.5}, "history=0.5 is not allowed"),
    ],
)
def test_settings_out_of_range_are_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(AdaptError, match=said):
        yearly(tmp_path, **settings)


def test_a_horizon_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    data = yearly(tmp_path)
    data.horizon = 4
    with pytest.raises(AdaptError, match="horizon=4: the competition asks for 6 steps"):
        data.test_dataloader()
    data.horizon = 0
    with pytest.raises(AdaptError, match="of a competition are for the aim Forecast alone"):
        data.train_dataloader()
    data.horizon = 30
    with pytest.raises(AdaptError, match="'Y0' has 20 rows: to train on horizon=30 needs 31"):
        data.train_dataloader()
    assert len(next(iter(data.test_dataloader()))[1][0]) == 6  # to be tested it may be longer
    data.look_back = None
    with pytest.raises(AdaptError, match=r"set data\.look_back and data\.horizon first"):
        data.test_dataloader()
    with pytest.raises(AdaptError, match="the series are not read yet"):
        _ = M4(str(tmp_path), "Yearly").contest
