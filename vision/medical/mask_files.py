"""Masks as files that lie on what they were made from: the same kind, size and geometry."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...core.errors import AdaptError
from .files import DICOM, NIFTI, File

Mask = NDArray[np.uint8]

# What says how stored values become brightness or colour, and how they are packed: a mask has its
# own.
_OF_VALUES = re.compile(
    "Rescale|Window|.*LUT|.*PaletteColor|PixelPadding|PixelValueTransformation|.*PixelData$"
    "|(Smallest|Largest).*PixelValue|PlanarConfiguration|ExtendedOffset|Lossy|IconImage"
)


def suffix_for(file: File) -> str:
    """What the mask's file ends in: a scan's own suffix, .png for any other picture.

    >>> suffix_for(File.at("eye.JPG")), suffix_for(File.at("head.nii.gz"))
    ('.png', '.nii.gz')
    """
    return file.suffix if file.suffix in (*NIFTI, *DICOM) else ".png"


def mask_content(file: File, masks: Sequence[Mask]) -> bytes:
    """The bytes of a mask file for `file`, of whose slices `masks` are [h, w] of 0 and 1.

    ==========  ==================================================================================
    PNG         8 bits, 0 and 255, upright where the photograph's EXIF data asks for a turn
    NIfTI       uint8 of 0 and 1, with affine, units and all else of the scan's header
    DICOM       8 bits, 0 and 255: a derived image (secondary capture) in a series of its own, with
                patient, study, position, orientation and spacing of the scan. Not a segmentation
                object (SEG): every viewer shows it, and it is read back like any scan
    ==========  ==================================================================================

    Raises `AdaptError` for a scan whose header cannot be written again.
    """
    try:
        if file.suffix in NIFTI:
            return _nifti(file, masks)
        if file.suffix in DICOM:
            return _dicom(file, masks)
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdaptError(f"no mask can have the header of {file}: {cause}") from error
    content = io.BytesIO()
    Image.fromarray(masks[0] * np.uint8(255)).save(content, "PNG")
    return content.getvalue()


def _nifti(file: File, masks: Sequence[Mask]) -> bytes:
    import nibabel

    scan: Any = nibabel.load(file.path)
    values = np.stack(masks, axis=-1).swapaxes(0, 1).reshape(scan.shape)
    header = scan.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 1
    content: bytes = type(scan)(values, scan.affine, header).to_bytes()
    # Without the time of day, so that the same mask is the same file.
    return gzip.compress(content, mtime=0) if file.suffix.endswith(".gz") else content


def _dicom(file: File, masks: Sequence[Mask]) -> bytes:
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is odd in the scan's header
        return _derived(pydicom.dcmread(file.path), np.stack(masks) * np.uint8(255))


def _derived(made: Any, frames: NDArray[np.uint8]) -> bytes:
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

    little = made.original_encoding[1] is not False  # pydicom does not turn numbers round
    _forget_values(made)
    made.Rows, made.Columns = frames.shape[1:]
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 8, 8, 7, 0
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.ImageType = ["DERIVED", "SECONDARY", "MASK"]
    made.Modality, made.ConversionType, made.SeriesDescription = "OT", "WSD", "Mask"
    _name_anew(made, frames)
    content = frames.tobytes()
    made.PixelData = content + b"\0" * (len(content) % 2)
    made["PixelData"].VR = "OB"
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    written = io.BytesIO()
    made.save_as(written, implicit_vr=False, little_endian=little, enforce_file_format=True)
    return written.getvalue()


def _forget_values(part: Any) -> None:
    """In the data set and in those of its frames."""
    for element in list(part):
        if _OF_VALUES.match(element.keyword):
            del part[element.tag]
        elif element.VR == "SQ":
            for item in element.value:
                _forget_values(item)


def _name_anew(made: Any, frames: NDArray[np.uint8]) -> None:
    """Identifiers that follow from the scan's and the mask: the same mask has the same again."""
    from pydicom import uid

    several = len(frames) > 1
    scan = str(made.get("SOPInstanceUID", "")), str(made.get("SeriesInstanceUID", ""))
    made.SOPClassUID = (
        uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage
        if several
        else uid.SecondaryCaptureImageStorage
    )
    seen = hashlib.sha256(frames.tobytes()).hexdigest()
    made.SOPInstanceUID = uid.generate_uid(entropy_srcs=[*scan, seen])
    made.SeriesInstanceUID = uid.generate_uid(entropy_srcs=[scan[1], "mask"])
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
