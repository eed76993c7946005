"""Files of pictures, in a folder or in a .zip of one, whose bytes are read when asked for."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...core.errors import AdaptError

PLAIN = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".webp")
NIFTI = (".nii", ".nii.gz")
DICOM = (".dcm", ".dicom")
SUFFIXES = (*PLAIN, *NIFTI, *DICOM)


@dataclass(frozen=True, order=True)
class File:
    """A file by its name inside a folder or a .zip file; `layer` is one of a volume's slices."""

    top: Path
    name: str
    layer: int | None = None

    @staticmethod
    def at(path: str | Path) -> File:
        """A file of its own."""
        return File(Path(path).parent, Path(path).name)

    def __str__(self) -> str:
        which = "" if self.layer is None else f", slice {self.layer}"
        return f"{self.top / self.name}{which}"

    @property
    def stem(self) -> str:
        """The name without folders and suffix.

        >>> File(Path("a"), "images/scan.nii.gz").stem
        'scan'
        """
        name = PurePosixPath(self.name).name
        return name[: len(name) - len(self.suffix)]

    @property
    def suffix(self) -> str:
        """In small letters, .nii.gz as one; empty when it is none of `SUFFIXES`."""
        lowered = self.name.lower()
        fitting = [suffix for suffix in SUFFIXES if lowered.endswith(suffix)]
        return max(fitting, key=len, default="")

    @property
    def path(self) -> Path:
        """Where it lies; `AdaptError` when that is inside a .zip."""
        if self.top.is_file():
            raise AdaptError(
                f"{self} lies in a .zip, where only {', '.join(PLAIN)} can be read: unpack it"
            )
        return self.top / self.name

    def bytes(self) -> bytes:
        """What it holds; `AdaptError` names one that is missing or damaged."""
        try:
            if not self.top.is_file():
                return (self.top / self.name).read_bytes()
            with zipfile.ZipFile(self.top) as archive:
                return archive.read(self.name)
        except (OSError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise AdaptError(f"cannot read {self}: {error}") from error


def files_in(top: Path) -> list[File]:
    """Every picture file anywhere in a folder or a .zip, by name; hidden ones are left out."""
    if top.is_dir():
        found = [f.relative_to(top).as_posix() for f in top.rglob("*") if f.is_file()]
    elif top.is_file():
        found = names_in(top)
    else:
        raise AdaptError(f"there is no folder or .zip file {top}")
    files = sorted(File(top, name) for name in found if _shown(name))
    return [file for file in files if file.suffix]


def names_in(top: Path) -> list[str]:
    """Every file in a .zip; `AdaptError` for one that cannot be read."""
    try:
        with zipfile.ZipFile(top) as archive:
            return [info.filename for info in archive.infolist() if not info.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise AdaptError(f"{top} is no folder and no whole .zip file: {error}") from error


def _shown(name: str) -> bool:
    """Not hidden, and not what macOS adds to a .zip."""
    parts = PurePosixPath(name).parts
    return not any(part.startswith(".") or part == "__MACOSX" for part in parts)
