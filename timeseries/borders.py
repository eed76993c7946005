"""Which rows of a series are for training, validation and test, as the benchmarks cut them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from ..core.errors import AdaptError

_ETT_HOURS = {"train": 12 * 30 * 24, "val": 4 * 30 * 24, "test": 4 * 30 * 24}


@dataclass(frozen=True)
class Borders:
    """Rows of the three parts, ends exclusive.

    `val` and `test` begin a look-back before the first row that is forecast, so that their first
    window reads its past from the part before and forecasts the part's own first rows.
    """

    train: range
    val: range
    test: range


def ett(rows: int, look_back: int, rows_per_hour: int = 1) -> Borders:
    """The borders of ETTh (one row per hour) and ETTm (four): 12, 4 and 4 months of 30 days.

    The rows after them are not used: 3,020 of ETTh's 17,420.

    >>> ett(17_420, look_back=336)
    Borders(train=range(0, 8640), val=range(8304, 11520), test=range(11184, 14400))
    """
    train, val, test = (_ETT_HOURS[part] * rows_per_hour for part in ("train", "val", "test"))
    if rows < train + val + test:
        raise AdaptError(
            f"{rows} rows: ETT's borders need {train + val + test} with {rows_per_hour} an hour;"
            " another table is cut by shares"
        )
    return _borders(train, train + val, train + val + test, look_back)


def shares(rows: int, look_back: int, train: float = 0.7, test: float = 0.2) -> Borders:
    """The borders of the other benchmarks: int(0.7 n) rows, the rest, int(0.2 n) rows at the end.

    >>> shares(966, look_back=104)
    Borders(train=range(0, 676), val=range(572, 773), test=range(669, 966))
    """
    if train <= 0 or test < 0 or train + test > 1:
        raise AdaptError(
            f"shares train={train:g}, test={test:g}: train above 0, test from 0, together up to 1"
        )
    end = int(rows * train)
    return _borders(end, rows - int(rows * test), rows, look_back)


def few(borders: Borders, share: float, look_back: int) -> Borders:
    """Only the earliest share of the training rows, as in the few-shot benchmarks.

    Of the n rows that training could forecast, int(share * n) are kept behind the first look-back.
    The published protocol still scales by all the training rows.

    >>> few(ett(17_420, 336), 0.05, look_back=336).train
    range(0, 751)
    """
    if not 0 < share <= 1:
        raise AdaptError(f"few={share:g} is not allowed: a share above 0 and up to 1")
    # As a decimal number: 0.07 * 100 is not 7.
    kept = int((borders.train.stop - look_back) * Fraction(str(share)))
    return replace(borders, train=range(borders.train.start, kept + look_back))


def windows(part: range, look_back: int, horizon: int) -> int:
    """How many windows of look_back + horizon rows lie in a part, one for every first row.

    >>> [windows(part, 336, 96) for part in (range(0, 8640), range(8304, 11520))]
    [8209, 2785]
    """
    return max(0, len(part) - look_back - horizon + 1)


def _borders(train: int, val: int, test: int, look_back: int) -> Borders:
    if look_back > train:
        raise AdaptError(f"look_back={look_back} is longer than the {train} rows for training")
    return Borders(range(train), range(train - look_back, val), range(val - look_back, test))
