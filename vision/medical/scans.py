"""Slices of NIfTI and DICOM files, through MONAI's readers."""

from __future__ import annotations

import struct
import warnings
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import AdaptError
from .files import NIFTI, PLAIN, File

Values = NDArray[Any]
Spacing = tuple[float, float]
Scan = tuple[Values, Spacing | None, str | None]  # [h, w, layers] or [h, w, layers, 3]

_MILLIMETRES = {"meter": 1e3, "micron": 1e-3}  # what NIfTI leaves open is taken as mm


def read_scan(file: File) -> tuple[Values, Spacing | None, str | None]:
    """Values [h, w] or [h, w, 3] as stored, the distance of pixels, down and across, in mm, axes.

    NIfTI: the second axis of the file goes down and the first one across, and `layer` counts along
    the third one; it is not turned into a standard orientation, so that a mask that is written
    back lies where it was; axes say where the file's run in the patient, such as RAS, None where
    it does not. DICOM: rows and columns after its slope and intercept (Hounsfield units in CT),
    MONOCHROME1 turned to bright on dark, `layer` counts its frames.

    Raises `AdaptError` for a file that cannot be read, a spacing that is no length, a volume
    without `layer` and a `layer` that it does not have.
    """
    values, spacing, axes = _opened(file)
    layers = values.shape[2]
    if file.layer is None and layers != 1:
        raise AdaptError(f"{file} is a volume of {layers} slices: say which one")
    if not 0 <= (file.layer or 0) < layers:
        raise AdaptError(f"{file}: there are slices 0 to {layers - 1}")
    return values[:, :, file.layer or 0], spacing, axes


def layers_of(file: File) -> int:
    """How many slices there are: 1 of a picture."""
    return 1 if file.suffix in PLAIN else int(_opened(file)[0].shape[2])


def _opened(file: File) -> Scan:
    try:
        return _volume(file.path, file.path.stat().st_mtime_ns)
    except OSError as error:
        raise AdaptError(f"cannot read the scan {file.path}: {error}") from error


# A volume is decompressed as a whole: its slices are usually asked for one after another.
@lru_cache(maxsize=2)
def _volume(path: Path, changed: int) -> Scan:
    """[h, w, layers] or [h, w, layers, 3]."""
    read = _nifti if path.name.lower().endswith(NIFTI) else _dicom
    try:
        values, spacing, axes = read(path)
    except AdaptError:
        raise
    except _unreadable() as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdaptError(f"cannot read the scan {path}: {cause}") from error
    if values.dtype.kind not in "iufb" or values.size == 0:
        raise AdaptError(f"{path} holds {values.dtype} {list(values.shape)}: no plain numbers")
    if spacing is not None and not (np.isfinite(spacing).all() and min(spacing) > 0):
        raise AdaptError(f"{path} says that its pixels are {spacing[0]:g} x {spacing[1]:g} mm")
    return values, spacing, axes


def _unreadable() -> tuple[type[Exception], ...]:
    """What the readers raise for damaged files."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from pydicom.errors import InvalidDicomError

    own = (ImageFileError, HeaderDataError, InvalidDicomError, zlib.error, struct.error)
    return (*own, OSError, EOFError, ValueError, RuntimeError)


def _nifti(path: Path) -> Scan:
    import nibabel
    from monai.data.image_reader import NibabelReader

    reader = NibabelReader()
    opened = reader.read(path)
    values = np.asarray(reader.get_data(opened)[0])
    unit = _MILLIMETRES.get(opened.header.get_xyzt_units()[0], 1.0)
    across, down = (unit * float(length) for length in opened.header["pixdim"][1:3])
    if values.ndim not in (2, 3):
        raise AdaptError(f"{path} has {values.ndim} axes: slices of two or three are read")
    swapped = values.swapaxes(0, 1)
    # Without either code the file does not say where it lies.
    says = int(opened.header["sform_code"]) or int(opened.header["qform_code"])
    axes = "".join(letter or "?" for letter in nibabel.aff2axcodes(opened.affine)) if says else None
    return swapped.reshape(*swapped.shape[:2], -1), (down, across), axes


def _dicom(path: Path) -> Scan:
    from monai.data.image_reader import PydicomReader

    reader = PydicomReader(swap_ij=False)
    with warnings.catch_warnings():
        # Of what is odd in the header; without a position in the patient there is no affine matrix,
        # and none is used here.
        warnings.simplefilter("ignore", UserWarning)
        opened = reader.read(path)
        values = np.asarray(reader.get_data(opened)[0])
    if opened.get("PhotometricInterpretation") == "MONOCHROME1":
        values = values.max() - (values - values.min())  # in this order nothing overflows
    spacing = opened.get("PixelSpacing") or opened.get("ImagerPixelSpacing")
    frames = int(opened.get("NumberOfFrames") or 1)
    values = np.moveaxis(values, 0, 2) if frames > 1 else values[:, :, None]
    return values, (float(spacing[0]), float(spacing[1])) if spacing else None, None
