"""Pictures and masks as files come: of any depth, colour and size, plain, NIfTI or DICOM."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polyadapt.core.errors import AdaptError
from polyadapt.tests.medical_cases import as_dicom, as_nifti
from polyadapt.vision.medical.files import File, files_in
from polyadapt.vision.medical.masks import Picture, read_mask, read_picture
from polyadapt.vision.medical.scans import layers_of

MASK = np.array([[0, 1, 1], [0, 0, 1]], dtype=np.uint8)


def saved(folder: Path, pixels: Any, name: str = "a.png", **how: Any) -> File:
    Image.fromarray(np.asarray(pixels)).save(folder / name, **how)
    return File.at(folder / name)


def refused(file: File, **how: Any) -> str:
    with pytest.raises(AdaptError) as caught:
        read_mask(file, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Masks: what is marked


@pytest.mark.parametrize("value", [1, 7, 255])
def test_any_second_value_marks_the_structure(tmp_path: Path, value: int) -> None:
    assert np.array_equal(read_mask(saved(tmp_path, MASK * np.uint8(value))), MASK)


def test_masks_of_one_bit_and_of_16_are_read(tmp_path: Path) -> None:
    assert np.array_equal(read_mask(saved(tmp_path, MASK.astype(bool))), MASK)
    for name in ("deep.png", "deep.tif"):
        deep = saved(tmp_path, MASK.astype(np.uint16) * np.uint16(65535), name)
        assert np.array_equal(read_mask(deep), MASK)


def test_one_colour_on_black_marks_the_structure(tmp_path: Path) -> None:
    red = MASK[..., None] * np.array([255, 0, 0], dtype=np.uint8)
    assert np.array_equal(read_mask(saved(tmp_path, red)), MASK)
    palette = Image.fromarray(MASK, mode=None)
    palette.putpalette([0, 0, 0, 0, 200, 30])
    palette.save(tmp_path / "p.png")
    assert np.array_equal(read_mask(File.at(tmp_path / "p.png")), MASK)


def test_two_colours_on_black_are_refused(tmp_path: Path) -> None:
    two = np.array([[[0, 0, 0], [255, 0, 0], [0, 255, 0]]], dtype=np.uint8)
    assert "has 2 colours on black" in refused(saved(tmp_path, two))


def test_transparency_is_the_mask_only_where_the_colour_says_nothing(tmp_path: Path) -> None:
    white = np.full((2, 3, 3), 255, dtype=np.uint8)
    clear = np.concatenate([white, MASK[..., None] * np.uint8(255)], axis=-1)
    assert np.array_equal(read_mask(saved(tmp_path, clear)), MASK)
    opaque = np.full((2, 3, 1), 255, dtype=np.uint8)
    drawn = np.concatenate([MASK[..., None] * white, opaque], axis=-1)
    assert np.array_equal(read_mask(saved(tmp_path, drawn)), MASK)
    nothing = np.concatenate([white * np.uint8(0), opaque], axis=-1)
    assert read_mask(saved(tmp_path, nothing)).sum() == 0


def test_transparency_of_greys_and_of_palettes_is_a_mask_too(tmp_path: Path) -> None:
    for grey in (0, 255):
        values = np.stack([np.full_like(MASK, grey), MASK * np.uint8(255)], axis=-1)
        assert np.array_equal(read_mask(saved(tmp_path, values)), MASK)
    palette = Image.fromarray(MASK, mode=None)
    palette.putpalette([255] * 6)
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.array_equal(read_mask(File.at(tmp_path / "p.png")), MASK)
    assert read_picture(File.at(tmp_path / "p.png")).pixels.min() == 255
    drawn = np.stack([MASK * np.uint8(255), np.full_like(MASK, 200)], axis=-1)
    assert np.array_equal(read_mask(saved(tmp_path, drawn)), MASK)


def test_an_empty_mask_and_a_full_one_are_right(tmp_path: Path) -> None:
    assert read_mask(saved(tmp_path, MASK * np.uint8(0))).sum() == 0
    assert read_mask(saved(tmp_path, np.full((2, 3), 255, dtype=np.uint8))).sum() == 6


def test_several_labels_are_refused_until_some_are_named(tmp_path: Path) -> None:
    labels = saved(tmp_path, np.array([[0, 1, 2], [0, 3, 2]], dtype=np.uint8))
    assert "has the values 0, 1, 2, 3: wanted are 0 and one other" in refused(labels)
    assert read_mask(labels, labels=(2,)).tolist() == [[0, 0, 1], [0, 0, 1]]
    assert read_mask(labels, labels=(1, 3)).tolist() == [[0, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize("quality", [60, 95])  # many values, and few close to black and white
def test_a_mask_blurred_by_jpeg_is_cut_at_the_half(tmp_path: Path, quality: int) -> None:
    y, x = np.mgrid[:96, :96]
    disc = ((y - 48) ** 2 + (x - 40) ** 2 < 900).astype(np.uint8)
    file = saved(tmp_path, disc * np.uint8(255), "m.jpg", quality=quality)
    assert (len(np.unique(np.array(Image.open(file.path)))) > 64) == (quality == 60)
    assert np.mean(read_mask(file) != disc) < 0.003


def test_labels_with_one_for_what_is_to_be_ignored_are_no_blurred_mask(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 2, 3, 4, 5, 255]], dtype=np.uint8)
    assert "has the values 0, 1, 2, 3, 4, ..." in refused(saved(tmp_path, labels))


def test_an_empty_file_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert refused(File.at(tmp_path / "a.png")).endswith(
        "it is empty, or no image that can be read"
    )


def test_a_photograph_is_no_mask(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    assert "has the values 0, 1, 2, 3, 4, ..." in refused(saved(tmp_path, noise))


def test_a_mask_of_another_size_than_its_picture_is_refused(tmp_path: Path) -> None:
    picture = Picture(np.zeros((3, 2, 3), dtype=np.uint8))
    said = refused(saved(tmp_path, MASK), of=picture)
    assert "is 2 x 3 pixels (height x width), its picture 3 x 2" in said


# Pictures


def test_a_picture_of_8_bits_is_as_it_is(tmp_path: Path) -> None:
    colours = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert np.array_equal(read_picture(saved(tmp_path, colours)).pixels, colours)
    grey = read_picture(saved(tmp_path, colours[..., 0])).pixels
    assert np.array_equal(grey, np.repeat(colours[..., :1], 3, axis=-1))
    half = np.concatenate([colours, np.full((2, 4, 1), 9, dtype=np.uint8)], axis=-1)
    assert np.array_equal(read_picture(saved(tmp_path, half)).pixels, colours)


def test_16_bits_go_from_the_darkest_to_the_brightest_or_through_a_window(tmp_path: Path) -> None:
    deep = saved(tmp_path, np.array([[1000, 1100], [1200, 1510]], dtype=np.uint16))
    assert read_picture(deep).pixels[..., 0].tolist() == [[0, 50], [100, 255]]
    windowed = read_picture(deep, window=(1050, 1150)).pixels[..., 2]
    assert windowed.tolist() == [[0, 128], [255, 255]]
    with pytest.raises(AdaptError, match="low, then high"):
        read_picture(deep, window=(5, 5))


def test_a_deep_picture_of_one_value_is_black(tmp_path: Path) -> None:
    flat = saved(tmp_path, np.full((2, 2), 900, dtype=np.uint16))
    assert read_picture(flat).pixels.max() == 0


def test_the_orientation_of_a_photograph_is_carried_out(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    file = saved(tmp_path, np.zeros((10, 20, 3), dtype=np.uint8), "a.jpg", exif=exif)
    assert read_picture(file).size == (20, 10)


def test_a_picture_of_8000_pixels_is_read_whole(tmp_path: Path) -> None:
    long = np.zeros((8000, 40), dtype=np.uint8)
    long[7999, 39] = 255
    file = saved(tmp_path, long)
    assert read_picture(file).size == (8000, 40)
    assert np.argwhere(read_mask(file)).tolist() == [[7999, 39]]


def test_several_pages_and_files_that_are_no_picture_are_refused(tmp_path: Path) -> None:
    page = Image.fromarray(MASK)
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page])
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "c.txt").write_text("x")
    for name, cause in [("a.tif", "2 pages"), ("b.png", "cannot read"), ("c.txt", "of no kind")]:
        with pytest.raises(AdaptError, match=cause):
            read_picture(File.at(tmp_path / name))
    with pytest.raises(AdaptError, match=r"cannot read .*missing\.png"):
        read_picture(File.at(tmp_path / "missing.png"))


# A .zip as a folder


def test_a_zip_is_read_like_a_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("in/b.png", "in/a.nii.gz", ".hidden/c.png", "__MACOSX/d.png", "read.me"):
            stream = io.BytesIO()
            Image.fromarray(MASK).save(stream, "png")
            archive.writestr(name, stream.getvalue())
    scan, mask = files_in(tmp_path / "a.zip")
    assert (scan.stem, scan.suffix, mask.stem) == ("a", ".nii.gz", "b")
    assert np.array_equal(read_mask(mask), MASK)
    with pytest.raises(AdaptError, match=r"lies in a \.zip.*: unpack it"):
        read_picture(scan)


def test_what_is_neither_folder_nor_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK no")
    with pytest.raises(AdaptError, match=r"no whole \.zip"):
        files_in(tmp_path / "a.zip")
    with pytest.raises(AdaptError, match="no folder"):
        files_in(tmp_path / "b")


# NIfTI and DICOM


def test_a_slice_of_nifti_has_its_rows_and_its_spacing_in_mm(tmp_path: Path) -> None:
    volume = np.zeros((3, 2, 4), dtype=np.float32)  # across, down, slices
    volume[2, 0, 1] = 5
    file = as_nifti(tmp_path / "v.nii.gz", volume, spacing=(0.5, 0.25, 3))
    layer = File(file.top, file.name, 1)
    assert layers_of(file) == 4
    assert read_picture(layer).pixels[..., 0].tolist() == [[0, 0, 255], [0, 0, 0]]
    assert read_picture(layer).spacing == (0.25, 0.5)
    assert read_mask(layer, of=read_picture(layer)).tolist() == [[0, 0, 1], [0, 0, 0]]


def test_units_of_nifti_other_than_mm_are_converted(tmp_path: Path) -> None:
    file = as_nifti(tmp_path / "v.nii", np.eye(4), spacing=(20, 10), units="micron")
    assert read_picture(file).spacing == pytest.approx((0.01, 0.02))


def test_a_volume_wants_a_slice_that_it_has(tmp_path: Path) -> None:
    file = as_nifti(tmp_path / "v.nii", np.zeros((3, 2, 4), dtype=np.uint8))
    with pytest.raises(AdaptError, match="a volume of 4 slices: say which"):
        read_picture(file)
    with pytest.raises(AdaptError, match="slices 0 to 3"):
        read_picture(File(file.top, file.name, 4))


def test_a_mask_of_another_spacing_is_refused(tmp_path: Path) -> None:
    scan = as_nifti(tmp_path / "v.nii", np.eye(4), spacing=(1, 1))
    mask = as_nifti(tmp_path / "m.nii", np.eye(4), spacing=(1, 2))
    said = refused(mask, of=read_picture(scan))
    assert "has pixels of 2 x 1 mm, its picture of 1 x 1 mm" in said


def test_a_mask_that_is_stored_mirrored_is_refused(tmp_path: Path) -> None:
    import nibabel

    scan = as_nifti(tmp_path / "v.nii", np.eye(4))
    mirrored = nibabel.Nifti1Image(np.eye(4)[::-1], np.diag([-1.0, 1, 1, 1]))
    nibabel.save(mirrored, tmp_path / "m.nii")
    mask = File.at(tmp_path / "m.nii")
    said = refused(mask, of=read_picture(scan))
    assert "m.nii has axes that run LAS, its picture RAS" in said
    assert read_mask(mask, of=read_picture(mask)).sum() == 4
    nibabel.save(nibabel.Nifti1Image(np.eye(4), None), tmp_path / "m.nii")  # says nothing of it
    assert read_mask(mask, of=read_picture(scan)).sum() == 4


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdaptError, match="no finite numbers"):
        read_picture(as_nifti(tmp_path / "v.nii", np.array([[0.0, np.nan]])))
    with pytest.raises(AdaptError, match="4 axes"):
        read_picture(as_nifti(tmp_path / "w.nii", np.zeros((2, 2, 2, 2))))


def test_dicom_is_read_in_hounsfield_units_with_its_spacing(tmp_path: Path) -> None:
    stored = np.array([[0, 1000, 2000]], dtype=np.uint16)
    file = as_dicom(tmp_path / "a.dcm", stored, RescaleSlope=1, RescaleIntercept=-1000)
    picture = read_picture(file, window=(-100, 100))
    assert picture.pixels[..., 0].tolist() == [[0, 128, 255]]
    assert picture.spacing == (0.3, 0.2)
    assert read_picture(as_dicom(tmp_path / "b.dcm", stored, PixelSpacing=None)).spacing is None


def test_dicom_that_is_bright_at_zero_is_turned(tmp_path: Path) -> None:
    stored = np.array([[0, 1000, 4000]], dtype=np.uint16)
    kind = {"PhotometricInterpretation": "MONOCHROME1"}
    file = as_dicom(tmp_path / "a.dcm", stored, **kind)
    assert read_picture(file).pixels[..., 0].tolist() == [[255, 191, 0]]


def test_frames_of_dicom_are_its_slices(tmp_path: Path) -> None:
    stored = np.arange(12, dtype=np.uint16).reshape(3, 2, 2)
    file = as_dicom(tmp_path / "a.dcm", stored)
    assert layers_of(file) == 3
    last = read_picture(File(file.top, file.name, 2), window=(0, 11)).pixels[..., 0]
    assert last.tolist() == [[185, 209], [232, 255]]


def test_of_what_is_no_dicom_nothing_but_the_refusal_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"DICM" * 50)  # pydicom would warn of its header
    with pytest.raises(AdaptError, match="cannot read the scan"):
        read_picture(File.at(tmp_path / "a.dcm"))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.dcm"])
def test_a_scan_cut_short_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    values = np.arange(600, dtype=np.uint16).reshape(20, 30)
    file = (as_dicom if name.endswith("dcm") else as_nifti)(tmp_path / name, values)
    whole = file.path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) * 3 // 4):
        file.path.write_bytes(whole[:length])
        with pytest.raises(AdaptError, match="cannot read the scan") as caught:
            read_picture(file)
        assert "\n" not in str(caught.value)
