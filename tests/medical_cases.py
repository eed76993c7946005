"""Small medical files that the tests of the medical domain share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from polyadapt.vision.medical.files import File
from polyadapt.vision.medical.vessels import Vessels, vessel_picture

# Few and thick, which are drawn at once.
SPARSE = Vessels(trunks=3, width=0.06, least=0.03)


def as_nifti(
    path: Path, values: Any, spacing: tuple[float, ...] = (1.0, 1.0), units: str = "mm"
) -> File:
    """Save values [across, down] or [across, down, slices] as a NIfTI file."""
    import nibabel

    image = nibabel.Nifti1Image(np.asarray(values), np.eye(4))
    image.header.set_zooms((*spacing, *[1.0] * (image.ndim - len(spacing))))
    image.header.set_xyzt_units(units)
    nibabel.save(image, path)
    return File.at(path)


def as_dicom(path: Path, values: Any, **tags: Any) -> File:
    """Save uint16 [rows, columns] or [frames, rows, columns] as DICOM; None takes a tag away."""
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian

    made = pydicom.Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.2")
    made.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    made.Rows, made.Columns = values.shape[-2:]
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 16, 15
    made.PixelRepresentation, made.SamplesPerPixel = 0, 1
    if values.ndim == 3:
        made.NumberOfFrames = len(values)
    defaults = {"PhotometricInterpretation": "MONOCHROME2", "PixelSpacing": [0.3, 0.2]}
    for name, value in (defaults | tags).items():
        if value is not None:
            setattr(made, name, value)
    made.PixelData = values.astype("<u2").tobytes()
    made.save_as(path, enforce_file_format=True)
    return File.at(path)


def save_vessels(
    folder: Path, names: list[str], mask_suffix: str = "_mask", side: int = 32
) -> None:
    """images/NAME.png and masks/NAME<mask_suffix>.png of generated vessels."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    for seed, name in enumerate(names):
        picture, mask = vessel_picture(seed, side, side + 8, SPARSE)
        Image.fromarray((picture * 255).astype(np.uint8)).save(folder / f"images/{name}.png")
        Image.fromarray(mask * np.uint8(255)).save(folder / f"masks/{name}{mask_suffix}.png")
