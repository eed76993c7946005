"""The M competitions: thousands of short series, their files, and what is known of them."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..core.errors import AdaptError
from .frames import shown
from .metrics import M4_COUNTS
from .series import Values


@dataclass(frozen=True)
class Rules:
    """Of one group of series: steps to forecast, rows of a season (for MASE), training's reach.

    `history` times the horizon is how many rows at the end of a series training windows are drawn
    from: 1.5, and 10 for weekly, daily and hourly series, in the usual code for M4.
    """

    horizon: int
    period: int
    history: float = 1.5


M4_RULES = {
    "Yearly": Rules(6, 1),
    "Quarterly": Rules(8, 4),
    "Monthly": Rules(18, 12),
    "Weekly": Rules(13, 1, 10),
    "Daily": Rules(14, 1, 10),
    "Hourly": Rules(48, 24, 10),
}
M3_COUNTS = {"Yearly": 645, "Quarterly": 756, "Monthly": 1_428, "Other": 174}
M3_RULES = {
    "Yearly": Rules(6, 1),
    "Quarterly": Rules(8, 4),
    "Monthly": Rules(18, 12),
    "Other": Rules(8, 1),
}


@dataclass(frozen=True)
class Contest:
    """Series by name: what was known of each [rows], and what came then [horizon]."""

    names: tuple[str, ...]
    pasts: tuple[Values, ...]
    futures: tuple[Values, ...]


def read_m4(folder: str | Path, frequency: str) -> Contest:
    """One frequency of M4 from `Yearly-train.csv` and `Yearly-test.csv` and the like.

    They lie in `folder`, or in its `Train` and `Test` as in the organisers' repository: a header,
    then a line per series: its name and its values, the empty cells at the end left out.
    """
    if frequency not in M4_RULES:
        raise AdaptError(f"M4 has no frequency {frequency!r}: {', '.join(M4_RULES)}")
    found = [_m4_file(Path(folder), frequency, part) for part in ("Train", "Test")]
    pasts, futures = (dict(_rows(path)) for path in found)
    if lost := [name for name in pasts if name not in futures]:
        raise AdaptError(f"{found[1]} has no series {lost[0]!r}, {found[0]} has")
    horizon = M4_RULES[frequency].horizon
    for name in pasts:
        if len(futures[name]) != horizon:
            raise AdaptError(
                f"{found[1]}, series {name!r}: {len(futures[name])} values, {frequency} has"
                f" {horizon}"
            )
    return Contest(tuple(pasts), tuple(pasts.values()), tuple(futures[name] for name in pasts))


def read_forecasts(path: str | Path, contest: Contest) -> Values:
    """Forecasts [series, steps] of a submission to M4, such as `submission-Naive2.csv`.

    A file like the competition's own: a header, then a line per series, in any order.
    """
    path = Path(path)
    if not path.is_file():
        raise AdaptError(f"there is no file {path}")
    found = dict(_rows(path))
    if lost := [name for name in contest.names if name not in found]:
        raise AdaptError(f"{path} has no series {lost[0]!r}")
    lengths = {len(found[name]) for name in contest.names}
    if len(lengths) > 1:
        raise AdaptError(f"{path}: forecasts have {min(lengths)} to {max(lengths)} steps")
    return np.stack([found[name] for name in contest.names])


def is_whole_m4(contest: Contest, frequency: str) -> bool:
    """Whether all series of the frequency are there, so that a score is the published kind."""
    return len(contest.names) == M4_COUNTS[frequency]


def _m4_file(folder: Path, frequency: str, part: str) -> Path:
    name = f"{frequency}-{part.lower()}.csv"
    for path in (folder / name, folder / part / name, folder / "Dataset" / part / name):
        if path.is_file():
            return path
    raise AdaptError(f"there is no file {name} in {folder} or its folder {part}")


def _rows(path: Path) -> Iterator[tuple[str, Values]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        next(lines, None)  # the header
        for name, *cells in lines:
            while cells and cells[-1] in ("", "NA"):
                cells.pop()
            yield name, _numbers(cells, f"{path}, series {name!r}")


def _numbers(cells: Sequence[str], whose: str) -> Values:
    try:
        values = np.array(cells, dtype=np.float64)
    except ValueError as error:
        bad = next(place for place, cell in enumerate(cells) if not _is_number(cell))
        raise AdaptError(
            f"{whose}, value {bad + 1}: {shown(cells[bad])} is not a number"
        ) from error
    if not len(values):
        raise AdaptError(f"{whose} has no value")
    return values


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Archive:
    """A file of the Monash forecasting archive: its header, and series by name (NaN: missing)."""

    frequency: str | None
    horizon: int | None
    series: dict[str, Values]


def read_tsf(path: str | Path) -> Archive:
    """A .tsf file: `@key value` lines, `@data`, then `name:start:v1,v2,...` with `?` for missing.

    The text is cp1252. What other attributes a line has between its name and its values is not
    used. Raises `AdaptError` with the line for what is not of this form.
    """
    path = Path(path)
    if not path.is_file():
        raise AdaptError(f"there is no file {path}")
    header: dict[str, str] = {}
    attributes, series, within = 0, dict[str, Values](), False
    for number, line in enumerate(path.read_text(encoding="cp1252").splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if within:
            name, values = _tsf_series(line, attributes, f"{path}, line {number}")
            series[name] = values
        elif line.lower() == "@data":
            within = True
        elif line.lower().startswith("@attribute"):
            attributes += 1
        else:
            key, _, said = line.partition(" ")
            header[key.lower()] = said.strip()
    if not series:
        raise AdaptError(f"{path}: there is no series behind @data, is it a .tsf file?")
    horizon = header.get("@horizon", "")
    return Archive(header.get("@frequency"), int(horizon) if horizon.isdigit() else None, series)


def _tsf_series(line: str, attributes: int, where: str) -> tuple[str, Values]:
    *about, cells = line.split(":")
    if len(about) != attributes or not attributes:
        raise AdaptError(f"{where}: {len(about)} attributes before the values, not {attributes}")
    values = ["nan" if cell.strip() == "?" else cell for cell in cells.split(",")]
    return about[0], _numbers(values, f"{where}, series {about[0]!r}")
