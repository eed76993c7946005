"""Clips with their transcripts, where they come from: manifests and folders."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import AdaptError
from .audio import SAMPLE_RATE, read_audio

SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aiff", ".aif"})
PARTS = ("train", "val", "test")
_CALLED = {"valid": "val", "validation": "val", "dev": "val", "eval": "test"}
_KNOWN = ("path", "text", "speaker", "split")


@dataclass(frozen=True)
class Clip:
    """What is said in a recording, by whom, and how to hear it; `name` is for complaints."""

    name: str
    text: str
    hear: Callable[[], Tensor]
    seconds_of: Callable[[], float]
    speaker: str | None = None

    @classmethod
    def of_file(cls, path: Path, text: str, speaker: str | None = None) -> Clip:
        """The clip of an audio file."""
        hear, seconds = partial(read_audio, path), partial(seconds_of_file, path)
        return cls(str(path), text, hear, seconds, speaker)


Parts = Mapping[str, Sequence[Clip]]
"""train, val, test -> its clips; what is not there is split off by seed."""


def seconds_of_file(path: Path) -> float:
    """How long a file sounds: its header says so, or else it is read."""
    import soundfile

    if path.is_file():
        try:
            about = soundfile.info(path)
        except (soundfile.LibsndfileError, TypeError):
            pass  # a format for ffmpeg, or no audio: read_audio says which
        else:
            if about.frames and about.samplerate:
                return float(about.frames / about.samplerate)
    return len(read_audio(path)) / SAMPLE_RATE


# Manifests


def read_manifest(path: str | Path, part: str | None = None) -> dict[str, list[Clip]]:
    """The clips of a manifest by their part: all of `part`, or as its column `split` says.

    CSV with the header `path,text` and, if wanted, `speaker` and `split`; or JSON lines, an object
    with these keys each. Paths begin at the manifest's folder. `split` is train, val or test.
    """
    file = Path(path)
    found: dict[str, list[Clip]] = {}
    for line, row in rows_of(file):
        where = f"{file}, line {line}"
        known = {key: word_of(row, key, where) for key in _KNOWN}
        if not known["path"] or known["text"] is None:
            raise AdaptError(f"{where}: path and text are needed, found {sorted(map(str, row))}")
        name = part or part_called(known["split"] or "train", where)
        clip = Clip.of_file(file.parent / known["path"], known["text"], known["speaker"] or None)
        found.setdefault(name, []).append(clip)
    if not found:
        raise AdaptError(f"the manifest {file} names no clip")
    return found


def rows_of(file: Path) -> Iterator[tuple[int, Mapping[Any, Any]]]:
    """(line, row) of every row of a manifest, CSV with a header or JSON lines."""
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors put a mark before the first line
    except FileNotFoundError:
        raise AdaptError(f"there is no manifest {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AdaptError(f"cannot read the manifest {file}: {error}") from error
    if file.suffix.lower() in (".jsonl", ".json", ".ndjson"):
        yield from _json_rows(file, text)
        return
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        yield from ((reader.line_num, row) for row in reader)
    except csv.Error as error:
        raise AdaptError(f"{file}, line {reader.line_num}: {error}") from error


def _json_rows(file: Path, text: str) -> Iterator[tuple[int, Mapping[Any, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise AdaptError(f"{file}, line {number} is no JSON: {error}") from error
        if not isinstance(row, Mapping):
            raise AdaptError(f"{file}, line {number} is no object with keys and texts")
        yield number, row


def word_of(row: Mapping[Any, Any], key: str, where: str) -> str | None:
    """A text of a row, if it has the key."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise AdaptError(f"{where}: {key} is a text, not {value!r}")
    return value


def part_called(said: str, where: str) -> str:
    """The part that a word names: train, val or test, or what others call them."""
    name = said.strip().lower()
    name = _CALLED.get(name, name)
    if name not in PARTS:
        raise AdaptError(f"{where}: split {said!r} is not allowed: {', '.join(PARTS)}")
    return name


# Folders


def read_folders(root: str | Path) -> dict[str, list[Clip]]:
    """The clips in root/train, and root/val and root/test where they are; or all in root.

    A transcript stands beside its clip (a.wav, a.txt); in a part without any text file the
    transcript of a clip is the name of its folder (yes/1.wav).
    """
    top = Path(root)
    if not top.is_dir():
        raise AdaptError(f"there is no folder {top}")
    if not (top / "train").is_dir():
        return {"train": _in_folder(top)}
    parts = {folder: _CALLED.get(folder.name, folder.name) for folder in sorted(top.iterdir())}
    return {
        part: _in_folder(folder)
        for folder, part in parts.items()
        if part in PARTS and folder.is_dir()
    }


def _in_folder(top: Path) -> list[Clip]:
    files = sorted(f for f in top.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        raise AdaptError(f"the folder {top} holds no clip ({', '.join(sorted(SUFFIXES))})")
    if any(file.with_suffix(".txt").exists() for file in files):
        return [Clip.of_file(file, _beside(file)) for file in files]
    if any(file.parent == top for file in files):
        raise AdaptError(
            f"{top}: no clip has a transcript: put NAME.txt beside NAME.wav, or clips into folders"
            " that bear their transcripts"
        )
    return [Clip.of_file(file, file.parent.name.replace("_", " ")) for file in files]


def _beside(file: Path) -> str:
    transcript = file.with_suffix(".txt")
    try:
        return transcript.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AdaptError(f"{file}: cannot read its transcript {transcript}: {error}") from error


def joined(parts: Iterable[Mapping[str, Sequence[Clip]]]) -> dict[str, list[Clip]]:
    """Several manifests as one."""
    found: dict[str, list[Clip]] = {}
    for one in parts:
        for part, clips in one.items():
            found.setdefault(part, []).extend(clips)
    return found
