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
        refuse_columns(names, there, table, called)
    return names


def refuse_columns(
    names: Sequence[str], there: Sequence[str], table: Path, called: object
) -> NoReturn:
    """One line for a table without them."""
    raise AdaptError(
        f"{called} was trained on {len(names)} columns ({', '.join(names)}), {table} has"
        f" {', '.join(there)}: name {len(names)} columns with --columns, in that order"
    )
