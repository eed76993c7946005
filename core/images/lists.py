"""Image files named in text files, a line "path label" each: the form of most VTAB-1k code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from PIL import Image

from ..errors import AdaptError
from .preprocessing import open_image
from .sources import Source, Sources

Line = tuple[str, int]
DIGITS: Final = 6  # of a label: the largest one tells the number of classes


def read_lists(
    root: str | Path, lists: Mapping[str, str | None], classes: int | None = None
) -> Sources:
    """The images of `train` and, where `lists` names a file for them, of `val` and `test`.

    Raises `AdaptError` for a list that is missing or malformed, a label from `classes` on (their
    number; else the largest label tells it), an image that is in two parts and one that is missing.
    """
    top = Path(root)
    if not top.is_dir():
        raise AdaptError(f"there is no folder {top}")
    parts = {part: read_list(top / name) for part, name in lists.items() if name is not None}
    if "train" not in parts:
        raise AdaptError(f"{top}: a list of training images is needed")
    _refuse_shared(top, lists, parts)
    most = max(label for lines in parts.values() for _, label in lines)
    if classes is not None and most >= classes:
        raise AdaptError(f"{top}: a label is {most}, but there are {classes} classes")
    for part, lines in parts.items():
        _refuse_missing(top, str(lists[part]), lines)
    names = tuple(str(label) for label in range(classes or most + 1))
    sources = {part: _source(top, lines) for part, lines in parts.items()}
    return Sources(names, sources["train"], sources.get("val"), sources.get("test"))


def read_list(file: Path) -> list[Line]:
    """The (path, label) of every line; a path may hold blanks, its label is the last word.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = Path(folder, "test.txt").write_text("test/a b.png 3\\n")
    ...     read_list(Path(folder, "test.txt"))
    [('test/a b.png', 3)]
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors put a mark before the first line
    except FileNotFoundError:
        raise AdaptError(f"there is no list {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AdaptError(f"cannot read the list {file}: {error}") from error
    lines = [_line(file, number, line) for number, line in enumerate(text.splitlines(), 1) if line]
    if not lines:
        raise AdaptError(f"the list {file} is empty")
    return lines


def _line(file: Path, number: int, line: str) -> Line:
    path, _, label = line.strip().rpartition(" ")
    if not path or not label.isascii() or not label.isdecimal() or len(label) > DIGITS:
        raise AdaptError(
            f"{file}, line {number}: {line[:80]!r} is not a path and a label from 0 (of {DIGITS}"
            " digits at most), with a blank in between"
        )
    return path.rstrip(), int(label)


def _refuse_shared(
    top: Path, lists: Mapping[str, str | None], parts: Mapping[str, Sequence[Line]]
) -> None:
    """No image is in two parts, else what is measured was trained on."""
    owner: dict[str, str] = {}
    for part, lines in parts.items():
        for path, _ in lines:
            if owner.setdefault(path, part) != part:
                both = f"{lists[owner[path]]} and {lists[part]}"
                raise AdaptError(f"{top}: {path} is in {both}: parts must not share images")


def _refuse_missing(top: Path, name: str, lines: Sequence[Line]) -> None:
    """Found at the start: an image of the test part is opened hours later."""
    missing = [path for path, _ in lines if not (top / path).is_file()]
    if missing:
        raise AdaptError(
            f"{top / name} names {missing[0]}, which is no file in {top} ({len(missing)} of"
            f" {len(lines)} images are missing)"
        )


def _source(top: Path, lines: Sequence[Line]) -> Source:
    files = [top / path for path, _ in lines]
    return Source([label for _, label in lines], partial(_open, files))


def _open(files: Sequence[Path], index: int) -> Image.Image:
    return open_image(files[index])
