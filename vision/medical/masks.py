"""Pictures and masks from files, as they are found in clinics: of any depth, colour and size."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ...core.errors import AdaptError
from .files import PLAIN, File
from .scans import read_scan

Values = NDArray[Any]
Pixels = NDArray[np.uint8]
Mask = NDArray[np.uint8]
Spacing = tuple[float, float]

# A mask that JPEG or a resize has blurred: nearly all pixels are close to black or white, and there
# are many values, or some around both, which labels of structures (0, 1, 2, 255) are not.
_NEAR, _MANY, _AROUND, _BORDERS = 24, 64, 4, 0.15


@dataclass(frozen=True)
class Picture:
    """Colours uint8 [h, w, 3] and the distance of pixels, down and across, in mm where known.

    `axes` is where the axes of a NIfTI file run in the patient, such as RAS, where it says so.
    """

    pixels: Pixels
    spacing: Spacing | None = None
    axes: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]


def read_picture(file: File, window: tuple[float, float] | None = None) -> Picture:
    """A picture from PNG, TIFF, JPEG and the like, NIfTI or DICOM.

    Of 8 bits: as it is, greys as three equal channels, RGBA without its transparency. Deeper ones
    (16 bits, Hounsfield units, decimals): from the darkest to the brightest value of the picture,
    or from low to high of `window`, to 0 .. 255; what lies outside is cut off. An orientation that
    a photograph's EXIF data asks for is carried out.

    Raises `AdaptError` for what cannot be read, a volume without a `layer`, values that are not
    finite and an empty window.
    """
    if window is not None and not window[0] < window[1]:
        raise AdaptError(f"window={window} is not allowed: low, then high")
    values, spacing, axes = _values(file)
    if values.dtype != np.uint8 or window is not None:
        values = _to_bytes(values, window, file)
    if values.ndim == 2:
        values = np.repeat(values[..., None], 3, axis=-1)
    return Picture(np.ascontiguousarray(values[..., :3]), spacing, axes)


def read_mask(file: File, of: Picture | None = None, labels: tuple[int, ...] = ()) -> Mask:
    """uint8 [h, w]: 1 where the mask's file marks the structure, else 0.

    Two values are background (0, or black) and structure, whatever the second one is: 0/1, 0/255,
    black and one colour. In a file of one colour that has transparency this is the mask. A JPEG's
    values in between are cut at the half. More values are labels of several structures: name those
    that count in `labels`. `of` is the picture that it belongs to: same size, spacing and axes.

    Raises `AdaptError` for another size, spacing or way of the axes than the picture's and for
    values that do not tell what is marked. A mask without any structure is right: scores count it
    apart.
    """
    values, spacing, axes = _values(file, mask=True)
    mask = _binary(_one_channel(values, file), file, labels)
    if of is not None:
        _require_same(file, mask, spacing, of)
        _require_same_axes(file, axes, of)
    return mask


def _require_same(file: File, mask: Mask, spacing: Spacing | None, of: Picture) -> None:
    if mask.shape != of.size:
        (h, w), (height, width) = mask.shape, of.size
        raise AdaptError(
            f"the mask {file} is {h} x {w} pixels (height x width), its picture {height} x {width}:"
            " they must be of one size"
        )
    if spacing and of.spacing and not np.allclose(spacing, of.spacing, rtol=1e-3):
        raise AdaptError(
            f"the mask {file} has pixels of {_mm(spacing)}, its picture of {_mm(of.spacing)}: they"
            " must have one spacing"
        )


def _require_same_axes(file: File, axes: str | None, of: Picture) -> None:
    """What is stored mirrored or turned would mark other places of the picture."""
    if axes and of.axes and axes != of.axes:
        raise AdaptError(
            f"the mask {file} has axes that run {axes}, its picture {of.axes} (NIfTI's letters):"
            " store both the same way"
        )


def _mm(spacing: Spacing) -> str:
    return f"{spacing[0]:g} x {spacing[1]:g} mm"


# Values of a file


def _values(file: File, mask: bool = False) -> tuple[Values, Spacing | None, str | None]:
    """[h, w] or [h, w, 3] or, of a mask, [h, w, 4]; the spacing and the axes."""
    if file.suffix in PLAIN:
        return _plain(file, mask), None, None
    if not file.suffix:
        raise AdaptError(f"{file}: of no kind that is read; known are {', '.join(PLAIN)}, ...")
    return read_scan(file)


def _plain(file: File, mask: bool) -> Values:
    try:
        with warnings.catch_warnings():
            # Large scans of slides are meant; what Pillow refuses is twice as large.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(file.bytes()))
        with image:
            image.load()
            pages = getattr(image, "n_frames", 1)
            if pages > 1 and image.format != "MPO":  # whose other pages are previews
                raise AdaptError(f"{file} has {pages} pages: one picture a file is read")
            ImageOps.exif_transpose(image, in_place=True)
            return _array(image, mask)
    except AdaptError:
        raise
    except UnidentifiedImageError as error:  # whose own words are of our buffer
        raise AdaptError(
            f"cannot read the image {file}: it is empty, or no image that can be read"
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise AdaptError(f"cannot read the image {file}: {error}") from error


def _array(image: Image.Image, mask: bool) -> Values:
    if image.mode == "1":
        return np.array(image, dtype=np.uint8) * np.uint8(255)
    if image.mode.startswith(("I", "F")):
        return np.array(image)
    if mask and (image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info):
        return np.array(image.convert("RGBA"))
    if image.mode in ("L", "LA"):
        return np.array(image.convert("L"))
    # A palette becomes its colours; a large photograph is not copied for nothing.
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _to_bytes(values: Values, window: tuple[float, float] | None, file: File) -> Pixels:
    if not np.isfinite(values).all():
        raise AdaptError(f"{file} has values that are no finite numbers")
    low, high = window or (float(values.min()), float(values.max()))
    if high == low:  # a picture of one value
        return np.zeros(values.shape, dtype=np.uint8)
    # Not in whole numbers, whose differences of 16 bits would not fit.
    part = (values.astype(np.float32) - low) / (high - low)
    return (part.clip(0, 1) * 255).round().astype(np.uint8)


# What is marked


def _one_channel(values: Values, file: File) -> Values:
    """[h, w] of a mask in grey, in one colour on black, or in transparency."""
    if values.ndim == 2:
        return values
    colours: Values = values[..., :3]
    opaque: Values = values[..., -1]
    if values.shape[-1] == 4 and (colours == colours[0, 0]).all() and np.ptp(opaque):
        return opaque
    first: Values = colours[..., 0]
    if (colours == first[..., None]).all():
        return first
    marked = colours.any(axis=-1)
    kinds = np.unique(colours[marked], axis=0)
    if len(kinds) > 1:
        raise AdaptError(
            f"the mask {file} has {len(kinds)} colours on black: a mask marks in one colour, or in"
            " grey values of which `labels` names those that count"
        )
    return np.asarray(marked.astype(np.uint8))


def _binary(values: Values, file: File, labels: tuple[int, ...]) -> Mask:
    found = np.unique(values)
    if labels:
        return np.isin(values, labels).astype(np.uint8)
    if len(found) == 1:  # nothing is marked, or everything
        return np.full(values.shape, found[0] != 0, dtype=np.uint8)
    if len(found) == 2 and found[0] == 0:
        return np.asarray(values != 0, dtype=np.uint8)
    if values.dtype == np.uint8 and _two_and_their_blur(values):
        return np.asarray(values >= 128, dtype=np.uint8)
    listed = ", ".join(f"{value:g}" for value in found[:5]) + (", ..." if len(found) > 5 else "")
    raise AdaptError(
        f"the mask {file} has the values {listed}: wanted are 0 and one other; `labels` names those"
        " of several that count"
    )


def _two_and_their_blur(values: Values) -> bool:
    """Labels of several structures are few values, and a photograph is mostly in between."""
    found = np.unique(values)
    dark, light = (found <= _NEAR).sum(), (found >= 255 - _NEAR).sum()
    many = len(found) >= _MANY or min(dark, light) >= _AROUND
    between = (values > _NEAR) & (values < 255 - _NEAR)
    return bool(dark and light and many and between.mean() <= _BORDERS)
