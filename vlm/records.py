"""What one run of a few-shot comparison found; a record that is there stands for its run."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.container import write_atomically
from ..core.errors import AdaptError
from ..core.run_folder import make_folder

RECORD = "record.json"


@dataclass(frozen=True, kw_only=True)
class Record:
    """A number, and what it needs beside it to be compared with another."""

    method: str
    shots: int
    seed: int
    backbone: str
    data: str
    template: str
    classes: int
    train_images: int
    test_images: int
    top1: float
    trainable: int
    stored: int
    steps: int
    seconds: float
    memory_mib: float | None
    """torch's peak on a GPU while training; None on a CPU, whose peak would be the process's."""
    settings: str
    """SHA-256 of all settings."""


def read_record(folder: Path, settings: str) -> Record | None:
    """The record of a finished run, if it is there; one of other settings is refused."""
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        found = Record(**json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise AdaptError(f"{file} is no record of a run: {error}; remove it") from error
    if found.settings != settings:
        raise AdaptError(f"{folder} holds a run with other settings: choose another --out")
    return found


def write_record(folder: Path, record: Record) -> None:
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


def records_csv(records: Sequence[Record]) -> bytes:
    """The records as CSV, a column per field."""
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(Record)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(record) for record in records)
    return text.getvalue().encode()
