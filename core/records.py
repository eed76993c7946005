"""What one run of a comparison found, as a file in its folder that stands for the run."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from .container import write_atomically
from .errors import AdaptError
from .run_folder import make_folder

RECORD = "record.json"


class Recorded(Protocol):
    """A dataclass of plain values, among them `settings`: a digest of all that a run depends on."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def settings(self) -> str:
        """See `digest`."""
        ...


R = TypeVar("R", bound=Recorded)


def read_record(kind: type[R], folder: Path, settings: str) -> R | None:
    """The record of a finished run, if it is there; one of other settings is refused."""
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        found = kind(**json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise AdaptError(f"{file} is no record of a run: {error}; remove it") from error
    if found.settings != settings:
        raise AdaptError(f"{folder} holds a run with other settings: choose another --out")
    return found


def write_record(folder: Path, record: Recorded) -> None:
    """Last of all a run writes, so that one that was stopped starts again."""
    make_folder(folder)
    write_atomically(folder / RECORD, json.dumps(dataclasses.asdict(record)).encode())


def digest(settings: Any) -> str:
    """SHA-256 of a text, or of JSON values.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = settings if isinstance(settings, str) else json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def records_csv(records: Sequence[Recorded]) -> bytes:
    """The records, of which there is one at least, as CSV: a column per field, a tuple's values
    with spaces between them."""
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(records[0])]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({name: _cell(getattr(record, name)) for name in names})
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value
