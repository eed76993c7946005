"""What is to be segmented, by the words of a command, and where each mask goes."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...core.errors import AdaptError
from .files import File, files_in
from .mask_files import suffix_for


@dataclass(frozen=True)
class Job:
    """A picture or scan, where its mask goes, and its true mask if one is to be compared.

    `name` is the file's path in the folder that was named, without its suffix.
    """

    file: File
    name: str
    mask: Path
    truth: File | None = None


def jobs_of(words: Sequence[str], out: Path) -> list[Job]:
    """One job for each file that is named: by itself, by its folder or .zip, or by a pattern.

    A mask keeps the picture's place in its folder: images/left/a.jpg -> out/left/a.png. What lies
    in `out` itself is left out, so that masks of an earlier run are not segmented.

    Raises `AdaptError` for a word that names nothing and for two pictures with one name.
    """
    if out.exists() and not out.is_dir():
        raise AdaptError(f"--out {out} is not a folder")
    jobs: dict[Path, Job] = {}
    names: dict[str, File] = {}
    for file, name in _found(words, out):
        if (place := _place(file)) in jobs:
            continue
        if name in names:
            raise AdaptError(f"{names[name]} and {file} have one name: segment them apart")
        names[name] = file
        jobs[place] = Job(file, name, out / (name + suffix_for(file)))
    return list(jobs.values())


def with_truths(jobs: Sequence[Job], masks: Path, suffix: str = "") -> list[Job]:
    """The same with the true masks from a folder or .zip: NAME and `suffix`, of any kind.

    A true mask that was named, too, as in a folder with images/ and masks/, is no picture. Raises
    `AdaptError` for a picture without one.
    """
    found = {_bare(file): file for file in files_in(masks)}
    by_stem = {file.stem: file for file in found.values()}
    made = [
        replace(job, truth=found.get(job.name + suffix) or by_stem.get(job.file.stem + suffix))
        for job in jobs
    ]
    of = {_place(job.truth): job for job in made if job.truth and not _is_own(job)}
    made = [job for job in made if _place(job.file) not in of]
    for job in made:
        if job.truth is None:
            raise AdaptError(f"{job.file} has no mask {job.name}{suffix} in {masks}")
    return made


def _place(file: File) -> Path:
    return (file.top / file.name).absolute()


def _is_own(job: Job) -> bool:
    """Whether it would be compared with itself."""
    return job.truth is not None and _place(job.truth) == _place(job.file)


def _bare(file: File) -> str:
    return file.name[: len(file.name) - len(file.suffix)]


def _found(words: Sequence[str], out: Path) -> Iterator[tuple[File, str]]:
    for word in words:
        path = Path(word)
        if path.exists():
            yield from _inside(path, out)
        elif matches := sorted(glob.glob(word, recursive=True)):
            for match in matches:
                yield from _inside(Path(match), out)
        else:
            raise AdaptError(f"there is no picture, folder or .zip {word}, and no file fits it")


def _inside(path: Path, out: Path) -> Iterator[tuple[File, str]]:
    if path.is_file() and path.suffix.lower() != ".zip":
        file = File.at(path)
        yield file, file.stem
        return
    inside = [f for f in files_in(path) if out.resolve() not in (path / f.name).resolve().parents]
    if not inside:
        raise AdaptError(f"{path} holds no picture, NIfTI or DICOM file")
    for file in inside:
        yield file, _bare(file)


def refuse_overwriting(targets: Iterable[Path], inputs: Iterable[Path], table: Path) -> None:
    """`AdaptError` names a file to be written that is read, or that may be somebody's work.

    Files of an earlier run are replaced; one has been there if there is its `table`.
    """
    read = {_identity(path) for path in inputs if path.exists()}
    for target in targets:
        if target.exists() and _identity(target) in read:
            raise AdaptError(f"{target} is read: it would be overwritten; give another folder")
        if target.exists() and not table.exists():
            raise AdaptError(
                f"{target} is there, and no {table} of an earlier run: it may be drawn by hand;"
                " give another folder"
            )


def _identity(path: Path) -> tuple[int, int]:
    """The same for all names and links of a file."""
    about = path.stat()
    return about.st_dev, about.st_ino
