"""The columns that an adapter file was trained on, found again in a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ..core.errors import AdaptError


def trained_columns(
    names: Sequence[str], there: Sequence[str], table: Path, called: object
) -> Sequence[str]:
    """`names`, if all are `there`; refused with all of both, for the table and the set `called`.

    >>> trained_columns(["load"], ["date", "load"], Path("my.csv"), "my.safetensors")
    ['load']
    """
    if not {*names} <= {*there}:
        count = counted(len(names), "column")
        raise AdaptError(
            f"{_trained_on(names, called)}, {table} has {', '.join(there)}: name {count} with"
            " --columns, in that order"
        )
    return names


def refuse_series(
    names: Sequence[str], there: Sequence[str], table: Path, called: object
) -> NoReturn:
    """One line for a table that has other series below each other."""
    raise AdaptError(
        f"{_trained_on(names, called)}, {table} has the series {', '.join(there)}: forecast a table"
        " of those, or fit these their own set"
    )


def once(names: Sequence[str], whose: object) -> Sequence[str]:
    """`names`, unless one is there twice."""
    if twice := [name for at, name in enumerate(names) if name in names[:at]]:
        raise AdaptError(f"{whose}: the column {twice[0]!r} is named twice")
    return names


def counted(number: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "column"), counted(2, "column")
    ('1 column', '2 columns')
    """
    return f"{number} {what}{'s' * (number != 1)}"


def _trained_on(names: Sequence[str], called: object) -> str:
    return f"{called} was trained on {counted(len(names), 'column')} ({', '.join(names)})"
