"""Tables: CSV and Parquet, wide and long; every bad one is one clear line or a right answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyadapt.core import AdaptError
from polyadapt.timeseries.gaps import filled, runs
from polyadapt.timeseries.series import Series
from polyadapt.timeseries.tables import read_long, read_standard, read_table, side_by_side

HOURS = [f"2020-01-01 {hour:02}:00" for hour in range(24)]


def csv(folder: Path, *lines: str) -> Path:
    path = folder / "t.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def timed(folder: Path, times: list[str], column: str = "at") -> Path:
    return csv(folder, f"{column},x", *(f"{time},{row}" for row, time in enumerate(times)))


def refused(path: Path, **how: Any) -> str:
    """The one line that says why a table is refused."""
    with pytest.raises(AdaptError) as caught:
        read_table(path, **how)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 350
    return said.replace(str(path), "t.csv")


@pytest.mark.parametrize(
    ("frequency", "season"),
    [
        *(("h", 24), ("15min", 96), ("7h", 3), ("D", 7), ("2D", 4), ("B", 5)),
        *(("W-WED", 52), ("MS", 12), ("ME", 12), ("QS-OCT", 4), ("YS-JAN", 1)),
    ],
)
def test_the_step_of_the_times_is_inferred(tmp_path: Path, frequency: str, season: int) -> None:
    stamps = pd.date_range("2020-01-01", periods=20, freq=frequency)
    series = read_table(timed(tmp_path, [str(stamp) for stamp in stamps]), time="at")
    assert (series.frequency, series.season) == (frequency, season)
    assert series.times is not None
    assert (series.times == stamps.to_numpy("datetime64[ns]")).all()
    assert series.times.dtype == np.dtype("datetime64[ns]")


@pytest.mark.parametrize(
    ("times", "form", "frequency"),
    [
        (["1999/1/1 0:00", "1999/1/2 0:00", "1999/1/3 0:00"], None, "D"),
        (["1999", "2000", "2001", "2002"], None, "YS-JAN"),
        (["20200131", "20200229", "20200331"], None, "ME"),
        (["31.01.2020", "29.02.2020", "31.03.2020"], "%d.%m.%Y", "ME"),
        (["2020-01-01", "2020-01-01 12:00", "2020-01-02", "2020-01-02T12:00:00Z"], None, "12h"),
        (
            ["2020-03-29 01:30+01:00", "2020-03-29 03:00+02:00", "2020-03-29 03:30+02:00"],
            None,
            "30min",
        ),
    ],
)
def test_usual_forms_of_times_are_read(
    tmp_path: Path, times: list[str], form: str | None, frequency: str
) -> None:
    series = read_table(timed(tmp_path, times), time="at", time_format=form)
    assert series.frequency == frequency


def test_times_with_an_offset_become_utc(tmp_path: Path) -> None:
    times = ["2020-10-25 02:00+02:00", "2020-10-25 02:00+01:00", "2020-10-25 03:00+01:00"]
    series = read_table(timed(tmp_path, times), time="at")
    assert series.times is not None
    assert str(series.times[0]).startswith("2020-10-25T00:00")
    assert series.frequency == "h"


def test_parquet_and_csv_say_the_same(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": [1.0, 2.5, 4.0], "n": [1, 2, 3]})
    frame.index = pd.date_range("2020-01-01", periods=3, freq="D", name="at")
    frame.to_csv(tmp_path / "t.csv")
    frame.to_parquet(tmp_path / "t.parquet")
    a, b = (read_table(tmp_path / f"t.{kind}", time="at") for kind in ("csv", "parquet"))
    assert a.names == b.names == ("x", "n")
    assert a.frequency == b.frequency == "D"
    assert (a.values == b.values).all()
    assert (a.times == b.times).all()  # type: ignore[union-attr]


def test_columns_are_taken_by_name_in_the_order_asked(tmp_path: Path) -> None:
    path = csv(tmp_path, "place,a,b", "north,1,2", "south,3,4")
    assert read_table(path, columns=["b", "a"]).values.tolist() == [[2, 1], [4, 3]]
    assert read_table(path, columns=["a"], frequency="h").season == 24


def test_a_constant_column_is_read_as_it_is(tmp_path: Path) -> None:
    assert read_table(csv(tmp_path, "x", "5", "5", "5")).values.ravel().tolist() == [5, 5, 5]


def test_a_byte_order_mark_and_quotes_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes('\ufeff"at, local",x\n2020-01-01,1\n2020-01-02,2\n'.encode())
    assert read_table(tmp_path / "t.csv", time="at, local").names == ("x",)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([""], "t.csv: the file is empty"),
        (["a,b"], "t.csv: there is no row"),
        (["a,b,a", "1,2,3"], "t.csv: two columns are called 'a'"),
        ([",a", "0,5", "1,6"], "t.csv: a column has no name"),
        (["a;b", "1;2"], "t.csv: the header has no comma"),
        (["a,b", "1,2", "1,2,3"], "t.csv cannot be read: "),
        (["a,b", "1,2,3", "1,2,3"], "t.csv cannot be read: "),
        (["a,b", "1,2", "3,x7"], "t.csv, column 'b', row 2: 'x7' is not a number"),
        (["a,b", "1,2", "3,?"], "t.csv, column 'b', row 2: '?' is not a number"),
        (["a,b", "1,2", "3,inf"], "t.csv, column 'b', row 2: 'inf' is not finite"),
        (["at,b", "2020-01-01,2"], "t.csv, column 'at' holds text, '2020-01-01' in row 1: name"),
        (["a,b", "1,2", "3,"], "t.csv, column 'b' has no value in its last row 2: cut these rows"),
        (["a,b", "1,", "3,4"], "t.csv, column 'b' begins without a value, row 1: cut these rows"),
        (["a,b", "1,2", "3,", "2,9"], "t.csv, column 'b' has no value in row 2: missing=interpol"),
        (
            ["a,b", "1,2", "3,", "2,", "1,9"],
            "t.csv, column 'b' has no value in rows 2 to 3: missing",
        ),
        (["a,b", "1,", "3,"], "t.csv, column 'b' has no value at all: leave it out"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, lines: list[str], said: str) -> None:
    assert refused(csv(tmp_path, *lines)).startswith(said)


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (
            ["2020-01-02", "2020-01-01", "2020-01-03"],
            "row 2 of 2020-01-01 follows 2020-01-02: sort",
        ),
        (
            ["2020-01-01", "2020-01-02", "2020-01-02"],
            "rows 2 and 3 are both of 2020-01-02: one row",
        ),
        (["2020-01-01", "soon", "2020-01-03"], "row 2: 'soon' is none; the first is '2020-01-01'"),
        (["2020-01-01", "", "2020-01-03"], "row 2: has no time"),
        (["01/02/2020", "02/02/2020"], "begins with '01/02/2020': write times like 2020-01-31"),
        (["soon", "later"], "begins with 'soon': write times like"),
        (["1467331200", "1467334800"], "holds the number 1467331200: write times like"),
        (["0.5", "1.5"], "holds the number 0.5"),
        (["2020-01-01", "2020-01-02", "2020-01-04"], "2020-01-04 after 2020-01-02 is not one step"),
        (HOURS[:3] + HOURS[5:7], "row 4: 2020-01-01 05:00:00 after 2020-01-01 02:00:00 is not one"),
        (
            ["2020-01-01 00:00", "2020-01-01 00:07", "2020-01-01 00:09", "2020-01-01 01:00"],
            "the times are irregular, steps are from 0 days 00:02:00 to 0 days 00:51:00",
        ),
    ],
)
def test_times_that_are_no_steps_are_refused(tmp_path: Path, times: list[str], said: str) -> None:
    message = refused(timed(tmp_path, times), time="at")
    assert message.startswith("t.csv, column 'at'")
    assert said in message


@pytest.mark.parametrize(
    ("frequency", "said"),
    [
        ("D", "row 2: 2020-01-01 01:00:00 after 2020-01-01 is not one step of D: say the right"),
        ("30min", "row 2: 2020-01-01 01:00:00 after 2020-01-01 is not one step of 30min: fill the"),
        ("hourly", "frequency='hourly' is not known: write it as pandas does"),
    ],
)
def test_a_step_that_is_not_the_times_is_refused(tmp_path: Path, frequency: str, said: str) -> None:
    assert said in refused(timed(tmp_path, HOURS), time="at", frequency=frequency)


def test_a_step_far_too_small_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    stamps = [str(stamp) for stamp in pd.date_range("1700-01-01", periods=300, freq="YS")]
    path = timed(tmp_path, stamps)
    said = refused(path, time="at", frequency="s", missing="last")  # 10^10 seconds
    assert "row 2: 1701-01-01 after 1700-01-01 is not one step of s: say the right" in said
    assert read_table(path, time="at").frequency == "YS-JAN"


def test_a_step_is_checked_without_times_too(tmp_path: Path) -> None:
    path = csv(tmp_path, "x", "1", "2")
    for frequency in ("fortnightly", "", "0h", "-1h", "9999999YS"):
        assert f"frequency='{frequency}' is not known" in refused(path, frequency=frequency)


def test_rows_that_are_missing_are_filled_where_asked(tmp_path: Path) -> None:
    path = timed(tmp_path, HOURS[:3] + HOURS[5:8])  # values 0 1 2 _ _ 3 4 5
    for missing, values in (
        ("interpolate", [0, 1, 2, 2 + 1 / 3, 2 + 2 / 3, 3, 4, 5]),
        ("last", [0, 1, 2, 2, 2, 3, 4, 5]),
    ):
        series = read_table(path, time="at", missing=missing)  # type: ignore[arg-type]
        assert series.values.ravel() == pytest.approx(values)
        assert series.times is not None
        assert len(series.times) == 8
        assert series.frequency == "h"
    assert "a run of 2, up to 1 are filled" in refused(path, time="at", missing="last", longest=1)
    lines = ["a", "1", *["NaN"] * 25, "1"]
    assert "a run of 25, up to 24 are filled" in refused(csv(tmp_path, *lines))


def test_what_cannot_be_filled_is_refused(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,b", ",1", "2,1", "3,")
    for how in ("refuse", "last"):  # what no setting mends is told at once
        assert "column 'a' begins without a value, row 1" in refused(path, missing=how)
    assert "column 'b' has no value in its last row 3" in refused(
        path, missing="interpolate", columns=["b"]
    )
    assert read_table(path, columns=["b"], missing="last").values[-1] == 1
    assert "missing='zero' is not allowed: refuse, interpolate, last" in refused(
        path, missing="zero"
    )


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=3, max_size=40),
    st.sampled_from(["interpolate", "last"]),
)
def test_filling_keeps_what_is_known_and_stays_between(cells: list[float | None], how: Any) -> None:
    column = np.array([0.0, *(np.nan if cell is None else cell for cell in cells), 1.0])
    whole = filled(column[:, None], ["x"], how, longest=100).ravel()
    known = ~np.isnan(column)
    assert (whole[known] == column[known]).all()
    for start, stop in runs(~known):
        low, high = sorted((column[start - 1], column[stop]))
        assert ((low <= whole[start:stop]) & (whole[start:stop] <= high)).all()
        if how == "last":
            assert (whole[start:stop] == column[start - 1]).all()


def test_known_covariates_are_refused_by_name(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,holiday", "1,0", "2,1")
    assert refused(path, covariates=["holiday"]).startswith(
        "known covariates are not supported: 'holiday'"
    )
    ahead = csv(tmp_path, "sold,price", "1,5", "2,5", ",6", ",6")
    message = refused(ahead, missing="interpolate")
    assert "column 'sold' has no value in its last rows 3 to 4" in message
    assert "known ahead of time are not supported" in message


def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    path = csv(tmp_path, "at,x", "2020-01-01,1")
    assert refused(path, time="date") == "t.csv: there is no column 'date': at, x"
    assert refused(path, time="at", columns=["y"]) == "t.csv: there is no column 'y': at, x"
    assert refused(path, time="at", columns=["at"]) == "t.csv: there is no column to forecast"


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.csv").startswith("there is no file ")
    assert refused(tmp_path).startswith("there is no file ")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 but damaged PAR1")
    assert "cannot be read" in refused(tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_bytes(b"x\n\xff\xfe\n")
    assert "cannot be read" in refused(tmp_path / "t.csv")
    pd.DataFrame({"x": pd.date_range("2020", periods=3)}).to_parquet(tmp_path / "t.parquet")
    assert "column 'x' holds times: say time='x'" in refused(tmp_path / "t.parquet")


LONG = [f"{day},{shop},{value}" for day, shop, value in (
    ("2020-01-01", "tea", 1), ("2020-01-01", "milk", 4), ("2020-01-02", "tea", 2),
    ("2020-01-02", "milk", 5), ("2020-01-03", "tea", 3), ("2020-01-03", "milk", 6),
)]  # fmt: skip


def test_series_of_a_long_table_are_told_apart(tmp_path: Path) -> None:
    path = csv(tmp_path, "day,shop,sold", *LONG)
    series = read_long(path, id="shop", time="day")
    assert list(series) == ["tea", "milk"]
    assert [one.values.ravel().tolist() for one in series.values()] == [[1, 2, 3], [4, 5, 6]]
    assert {one.frequency for one in series.values()} == {"D"}
    wide = side_by_side(series)
    assert wide.names == ("tea", "milk")
    assert wide.values.tolist() == [[1, 4], [2, 5], [3, 6]]


def test_a_bad_series_of_a_long_table_is_named(tmp_path: Path) -> None:
    path = csv(tmp_path, "day,shop,sold", *LONG[:-1], "2020-01-03,milk,none left")
    with pytest.raises(AdaptError, match="series 'milk', column 'sold', row 3: 'none left' is not"):
        read_long(path, id="shop", time="day")
    path = csv(tmp_path, "day,shop,sold", *LONG, "2020-01-04,,3")
    with pytest.raises(AdaptError, match="row 7 has no 'shop'"):
        read_long(path, id="shop", time="day")
    with pytest.raises(AdaptError, match="there is no column 'store': day, shop, sold"):
        read_long(path, id="store", time="day")
    with pytest.raises(AdaptError, match="'sold'"):
        read_long(path, id="shop", covariates=["sold"])
    # Read as one wide series, its times are there twice: the message says what may be meant.
    assert "which column is the id" in refused(path, time="day", columns=["sold"])


def test_series_of_different_times_do_not_go_side_by_side(tmp_path: Path) -> None:
    path = csv(tmp_path, "day,shop,sold", *LONG, "2020-01-04,tea,9")
    series = read_long(path, id="shop", time="day")
    with pytest.raises(AdaptError, match=r"'milk' \(3 rows, 2020-01-01 to 2020-01-03\) and 'tea'"):
        side_by_side(series)
    with pytest.raises(AdaptError, match=r"'b' \(2 rows\) and 'a' \(3 rows\)"):
        side_by_side({"a": Series(np.zeros((3, 1)), ("x",)), "b": Series(np.zeros((2, 1)), ("x",))})


def test_a_benchmark_file_needs_its_date_column(tmp_path: Path) -> None:
    path = csv(tmp_path, "date,a", "2020-01-01 00:10,1", "2020-01-01 00:10,2")  # Weather has such
    series = read_standard(path, "10min")
    assert (series.names, series.season, series.times) == (("a",), 144, None)
    with pytest.raises(AdaptError, match="there is no column 'date': a"):
        read_standard(csv(tmp_path, "a", "1"), "h")
