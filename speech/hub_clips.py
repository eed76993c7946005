"""Clips of Hugging Face data sets; their audio is decoded here, not by that package."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.building import refuse_code
from ..core.errors import AdaptError
from .audio import SAMPLE_RATE, read_audio
from .clips import Clip, seconds_of_file

INSTALL = "pip install 'datasets>=4,<6'"
_STUMBLES = (
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)  # the hub's and the network's are OSErrors


def read_hub(
    name: str,
    config: str | None,
    splits: Mapping[str, str],
    columns: tuple[str, str, str | None],
    options: Mapping[str, Any],
) -> dict[str, list[Clip]]:
    """The clips of each split; `columns` are those of the audio, the text and the speaker."""
    refuse_code(options)
    if name == "pandas":
        raise AdaptError("the data set 'pandas' is not allowed: it unpickles; use csv or parquet")
    return {part: _clips(name, config, split, columns, options) for part, split in splits.items()}


def _clips(
    name: str,
    config: str | None,
    split: str,
    columns: tuple[str, str, str | None],
    options: Mapping[str, Any],
) -> list[Clip]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise AdaptError(
            f"data sets of Hugging Face need the package {error.name!r}, which is not installed:"
            f" {INSTALL}"
        ) from error
    try:
        table = datasets.load_dataset(name, config, split=split, **options)
    except (*_STUMBLES, datasets.exceptions.DatasetsError) as error:
        cause = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise AdaptError(f"the data set {name!r} ({split}) cannot be had: {cause}") from error
    if missing := [column for column in columns if column and column not in table.column_names]:
        has = ", ".join(table.column_names)
        raise AdaptError(f"the data set {name!r} has no column {missing[0]!r}; it has {has}")
    audio, text, speaker = columns
    # Undecoded: its own decoder is one more package, and resamples in its own way.
    table = table.cast_column(audio, datasets.Audio(decode=False))
    texts, speakers = table[text], table[speaker] if speaker else [None] * len(table)
    return [
        _clip(_Row(table, row, audio), f"{name}, {split} {row}", str(said), voice)
        for row, (said, voice) in enumerate(zip(texts, speakers, strict=True))
    ]


def _clip(row: _Row, name: str, text: str, speaker: object) -> Clip:
    voice = None if speaker is None else str(speaker)
    return Clip(name, text, row.hear, row.seconds, voice)


@dataclass(frozen=True)
class _Row:
    """One row's audio: a file, or the bytes of one."""

    table: Any
    row: int
    column: str

    def hear(self) -> Tensor:
        kept = self._kept()
        return read_audio(kept) if isinstance(kept, Path) else _heard(kept)

    def seconds(self) -> float:
        kept = self._kept()
        return seconds_of_file(kept) if isinstance(kept, Path) else len(_heard(kept)) / SAMPLE_RATE

    def _kept(self) -> Path | bytes:
        audio = self.table[self.row][self.column]
        if isinstance(audio, Mapping) and audio.get("bytes") is not None:
            return bytes(audio["bytes"])
        if isinstance(audio, Mapping) and audio.get("path"):
            return Path(audio["path"])
        raise AdaptError(f"row {self.row} of the column {self.column!r} holds no audio")


def _heard(content: bytes) -> Tensor:
    """The bytes of an audio file, whatever its format, as samples."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return read_audio(file.name)
