"""Which pictures there are, which mask is whose, and which part and patient each belongs to."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ...core.errors import AdaptError
from .files import DICOM, NIFTI, File, files_in, names_in
from .scans import layers_of

SPLIT_FILE = "data_split.csv"  # of SALT's data sets
_PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Pair:
    """A picture and its mask; `patient` is the picture's own name where none is told."""

    name: str
    picture: File
    mask: File
    patient: str
    part: str | None = None


def find_pairs(
    root: str, mask_suffix: str = "", patient: str | None = None, split_file: str | None = None
) -> list[Pair]:
    """The pictures of a folder or .zip, each with its mask, in the order of their names.

    A mask is called like its picture with `mask_suffix` behind the stem and has any suffix. It lies
    in masks/ where the picture lies in images/, else beside it; there a further NAME_... of a
    picture with a mask is left out, such as the mask of a second observer.

    Parts: root/train/, val/ and test/ where there are such folders; or a `split_file` with columns
    imgs and split, which is looked for as `data_split.csv` (the layout of SALT's data sets:
    images/NAME.png, masks/NAME_mask.png). `patient`: a regular expression, searched in the stem,
    whose first group is the patient, or a .csv file with columns image and patient. Tables may lie
    in the folder or .zip. Each slice of a volume is a picture.

    Raises `AdaptError` for a picture without a mask or with two, two with one name, a split file or
    patients that do not fit, and a patient whose pictures lie in two parts.
    """
    files = files_in(Path(root))
    masks, pictures = _divided(files, mask_suffix)
    if not pictures:
        raise AdaptError(
            f"{root} has no pictures: they are looked for in images/, with their masks in masks/,"
            " or beside their masks, which mask_suffix then tells from them"
        )
    _refuse_twins(root, pictures)
    pairs = [_pair(file, masks, mask_suffix) for file in pictures]
    pairs = _with_parts(pairs, Path(root), split_file)
    pairs = _with_patients(pairs, Path(root), patient)
    refuse_shared_patients(pairs)
    return [slice_ for pair in pairs for slice_ in _slices(pair)]


# Pictures and masks


def _divided(files: Sequence[File], suffix: str) -> tuple[dict[str, File], list[File]]:
    """The masks by folder and stem, and the pictures."""
    masks: dict[str, File] = {}
    pictures: list[File] = []
    for file in files:
        folders = _folders(file)
        if "masks" in folders or ("images" not in folders and suffix and _ends(file, suffix)):
            other = masks.setdefault(_key(file, ""), file)
            if other != file:
                raise AdaptError(f"{other} and {file} would be masks of one picture: leave one")
        elif "images" in folders or suffix:
            pictures.append(file)
    named = {_key(file, "") for file in pictures if _key(file, suffix) in masks}
    return masks, [file for file in pictures if not _goes_with_one(file, named)]


def _goes_with_one(file: File, named: set[str]) -> bool:
    """Whether it lies beside a picture NAME that has a mask and is called NAME_..."""
    words = _key(file, "").split("_")
    return "images" not in _folders(file) and any(
        "_".join(words[:count]) in named for count in range(1, len(words))
    )


def _folders(file: File) -> tuple[str, ...]:
    return PurePosixPath(file.name).parts[:-1]


def _ends(file: File, suffix: str) -> bool:
    return file.stem.endswith(suffix) and file.stem != suffix


def _key(file: File, suffix: str) -> str:
    folders = ["masks" if part == "images" else part for part in _folders(file)]
    return "/".join([*folders, file.stem + suffix])


def _pair(file: File, masks: dict[str, File], suffix: str) -> Pair:
    mask = masks.get(_key(file, suffix))
    if mask is None:
        raise AdaptError(f"{file} has no mask: {_key(file, suffix)} with any suffix is looked for")
    folders = [_PARTS[part] for part in _folders(file) if part in _PARTS]
    return Pair(file.stem, file, mask, file.stem, folders[0] if folders else None)


def _refuse_twins(root: str, pictures: Iterable[File]) -> None:
    seen: dict[str, File] = {}
    for file in pictures:
        if file.stem in seen:
            raise AdaptError(f"{root}: {seen[file.stem].name} and {file.name} have one name")
        seen[file.stem] = file


def _slices(pair: Pair) -> list[Pair]:
    """The pair itself, or one of each slice of a volume."""
    if pair.picture.suffix not in (*NIFTI, *DICOM) or layers_of(pair.picture) == 1:
        return [pair]
    slices, of_mask = layers_of(pair.picture), layers_of(pair.mask)
    if slices != of_mask:
        raise AdaptError(f"{pair.mask} has {of_mask} slices, its picture {slices}")
    return [
        replace(
            pair,
            name=f"{pair.name}_{layer:04}",
            picture=replace(pair.picture, layer=layer),
            mask=replace(pair.mask, layer=layer),
        )
        for layer in range(slices)
    ]


# Parts


def _with_parts(pairs: list[Pair], root: Path, split_file: str | None) -> list[Pair]:
    table = _table(root, split_file or SPLIT_FILE)
    if table is None:
        if split_file is None:
            return pairs
        table = File.at(split_file)
    parts: dict[str, str] = {}
    for row in read_table(table, "imgs", "split"):
        part = _PARTS.get(row[1].lower())
        if part is None:
            raise AdaptError(f"{table}: the split of {row[0]} is {row[1]!r}: train, val or test")
        stem = File(root, row[0]).stem
        if parts.setdefault(stem, part) != part:
            raise AdaptError(f"{table}: {row[0]} is in {parts[stem]} and in {part}")
    _require_same_names(table, parts, pairs)
    # A picture that the file does not list belongs to no part: it is left out, as its makers did.
    return [replace(pair, part=parts[pair.name]) for pair in pairs if pair.name in parts]


def _table(root: Path, name: str) -> File | None:
    """The table in a folder, or the one of this name that lies highest in a .zip."""
    if root.is_dir():
        return File(root, name) if (root / name).is_file() else None
    inside = [f for f in names_in(root) if f == name or f.endswith(f"/{name}")]
    return File(root, min(inside, key=lambda f: (f.count("/"), f))) if inside else None


def _require_same_names(table: File, named: Iterable[str], pairs: Iterable[Pair]) -> None:
    missing = sorted(set(named) - {pair.name for pair in pairs})
    if missing:
        raise AdaptError(
            f"{table} names {len(missing)} that are no pictures here, first {missing[0]}"
        )


def read_table(table: File, *columns: str) -> list[tuple[str, ...]]:
    """The named columns of a .csv file, row by row."""
    try:
        text = table.bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AdaptError(f"cannot read {table}: {error}") from error
    rows = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    absent = [column for column in columns if column not in (rows.fieldnames or ())]
    if absent:
        raise AdaptError(f"{table} has no column {absent[0]!r}; it has {rows.fieldnames}")
    read = [tuple((row[column] or "").strip() for column in columns) for row in rows]
    if not all(all(row) for row in read):
        raise AdaptError(f"{table}: a value of {' or '.join(columns)} is empty")
    return read


# Patients


def _with_patients(pairs: list[Pair], root: Path, patient: str | None) -> list[Pair]:
    if patient is None:
        return pairs
    if patient.lower().endswith(".csv"):
        table = _table(root, patient) or File.at(patient)
        rows = read_table(table, "image", "patient")
        of = {File(root, image).stem: who for image, who in rows}
        untold = [pair.name for pair in pairs if pair.name not in of]
        if untold:
            raise AdaptError(f"{table} names no patient of {untold[0]}")
        return [replace(pair, patient=of[pair.name]) for pair in pairs]
    pattern = _pattern(patient)
    return [replace(pair, patient=_patient(pattern, pair.name)) for pair in pairs]


def _pattern(written: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(written)
    except re.error as error:
        raise AdaptError(f"patient={written!r} is no regular expression: {error}") from error
    if pattern.groups < 1:
        raise AdaptError(f"patient={written!r} has no group: put the patient into (...)")
    return pattern


def _patient(pattern: re.Pattern[str], name: str) -> str:
    found = pattern.search(name)
    if not found or not found[1]:
        raise AdaptError(f"patient={pattern.pattern!r} finds no patient in the name {name!r}")
    return found[1]


def refuse_shared_patients(pairs: Iterable[Pair]) -> None:
    """`AdaptError` names a patient of whom there are pictures in two parts."""
    seen: dict[str, Pair] = {}
    for pair in pairs:
        first = seen.setdefault(pair.patient, pair)
        if first.part != pair.part:
            raise AdaptError(
                f"patient {pair.patient!r} is in two parts: {first.name} in {first.part},"
                f" {pair.name} in {pair.part}"
            )
