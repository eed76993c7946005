"""CSV and Parquet files as pandas frames, refused in one line where they are no plain table."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import AdaptError
from .series import Values

_SHORTENED = 40  # characters of a cell or of a reader's own words in a message


def read_frame(path: str | Path) -> Any:
    """The table in a .csv or .parquet file (a .csv may be compressed: .csv.gz, .csv.zip).

    An index that was written with a Parquet table is a column again. Raises `AdaptError` for a file
    that is missing, empty, damaged or has two columns of one name or one without a name.
    """
    path = Path(path)
    if not path.is_file():
        raise AdaptError(f"there is no file {path}")
    frame = _checked(path, _read_parquet if path.suffix == ".parquet" else _read_csv)
    names = [str(name) for name in frame.columns]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise AdaptError(f"{path}: two columns are called {', '.join(map(repr, twice))}")
    if any(not name.strip() or name.startswith("Unnamed: ") for name in names):
        raise AdaptError(f"{path}: a column has no name; an index that pandas wrote? index=False")
    if not len(frame):
        raise AdaptError(f"{path}: there is no row")
    frame.columns = names
    return frame


def _checked(path: Path, read: Callable[[Path], Any]) -> Any:
    import pandas as pd
    from pyarrow import ArrowException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return read(path)
    except AdaptError:
        raise
    except pd.errors.EmptyDataError as error:
        raise AdaptError(f"{path}: the file is empty") from error
    # UnicodeDecodeError and pandas' ParserError are ValueErrors.
    except (ValueError, OSError, EOFError, ArrowException, pd.errors.ParserWarning) as error:
        raise AdaptError(f"{path} cannot be read: {_one_line(error)}") from error


def _read_parquet(path: Path) -> Any:
    import pandas as pd

    frame = pd.read_parquet(path)
    return frame if isinstance(frame.index, pd.RangeIndex) else frame.reset_index()


def _read_csv(path: Path) -> Any:
    import pandas as pd

    # pandas would call the second of two equal names "x.1", so the header is read by itself.
    header = pd.read_csv(path, header=None, nrows=1, dtype=str, encoding="utf-8-sig")
    names = header.iloc[0].fillna("").tolist()
    if len(names) == 1 and {";", "\t"} & {*names[0]}:
        raise AdaptError(f"{path}: the header has no comma: columns are separated by commas")
    # index_col=False: else a row with one cell too many would shift all columns by one.
    return pd.read_csv(
        path,
        header=0,
        names=range(len(names)),
        index_col=False,
        encoding="utf-8-sig",
        low_memory=False,  # else a long column is read in pieces of different types
    ).set_axis(names, axis=1)


def require_columns(frame: Any, names: Sequence[str], whose: object) -> None:
    """Refuse a frame without one of the columns."""
    for name in names:
        if name not in frame.columns:
            raise AdaptError(f"{whose}: there is no column {name!r}: {', '.join(frame.columns)}")


def numbers(column: Any, whose: str, mend: str | None = None) -> Values:
    """A column as float64, NaN where it is empty; text is named with its row, counted from 1.

    `mend`: what to do about a column without a number, other than to say what it is.
    """
    import pandas as pd

    kind = pd.api.types
    if kind.is_datetime64_any_dtype(column) or kind.is_timedelta64_dtype(column):
        mend = mend or f"say time={column.name!r}, or leave it out"
        raise AdaptError(f"{whose} holds times: {mend}")
    read: Values = pd.to_numeric(column, errors="coerce").to_numpy(
        dtype=np.float64, na_value=np.nan
    )
    bad = np.isnan(read) & column.notna().to_numpy()
    if bad.all():
        known = f"say time={column.name!r} or id={column.name!r} if it is that"
        mend = mend or f"name the columns to forecast, or {known}"
        raise AdaptError(f"{whose} holds text, {shown(column.iloc[0])} in row 1: {mend}")
    for wrong, what in ((bad, "is not a number"), (np.isinf(read), "is not finite")):
        if wrong.any():
            row = int(wrong.argmax())
            raise AdaptError(f"{whose}, row {row + 1}: {shown(column.iloc[row])} {what}")
    return read


def shown(cell: object) -> str:
    """A cell in a message: on one line, not long."""
    text = str(cell)
    return repr(text if len(text) <= _SHORTENED else text[:_SHORTENED] + "...")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).removeprefix("Error tokenizing data. C error: ")[:200]
