"""The pieces of `vision segment`: windows, places that a person gives, files of masks, jobs."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.tests.medical_cases import as_dicom, as_nifti
from polyadapt.tests.segment_cases import BRIGHT, SIDE, bright, in_boxes
from polyadapt.vision.medical import segmenting
from polyadapt.vision.medical.files import File
from polyadapt.vision.medical.inference import in_windows, prompted, whole
from polyadapt.vision.medical.jobs import jobs_of, refuse_overwriting, with_truths
from polyadapt.vision.medical.mask_files import mask_content
from polyadapt.vision.medical.masks import Picture, read_mask, read_picture
from polyadapt.vision.medical.prompts import Places
from polyadapt.vision.medical.sam import Prompt
from polyadapt.vision.medical.segmenting import Failed, Manner, segment_all


def squares(height: int, width: int, cell: int = 8) -> Any:
    """A board of black and white squares, uint8 [h, w, 3]."""
    y, x = np.mgrid[:height, :width] // cell
    return np.repeat(((y + x) % 2 * 255).astype(np.uint8)[..., None], 3, axis=-1)


# Whole, in windows, where a person points


def test_pictures_of_several_sizes_are_answered_at_their_own() -> None:
    pictures = [squares(64, 48, 16), squares(20, 90, 10)]
    found = list(whole(bright, BRIGHT, pictures))
    assert [f.shape for f in found] == [(64, 48), (20, 90)]
    agree = ((found[0] > 0).numpy() == (pictures[0][..., 0] > 0)).mean()
    assert agree > 0.9  # half a pixel of the square blurs every border


def test_windows_of_the_network_s_size_answer_to_the_pixel() -> None:
    board = squares(75, 100)
    found = in_windows(bright, BRIGHT, board, side=SIDE, batch=3)
    assert np.array_equal((found > 0).numpy(), board[..., 0] > 0)


@pytest.mark.parametrize("size", [(20, 100), (100, 7), (5, 5)])
def test_a_picture_smaller_than_a_window_is_one(size: tuple[int, int]) -> None:
    board = squares(*size, cell=5)
    found = in_windows(bright, BRIGHT, board, side=64)
    assert found.shape == size
    assert ((found > 0).numpy() == (board[..., 0] > 0)).mean() > 0.7


def test_each_window_is_a_picture_of_its_own_and_a_batch_holds_as_many_as_asked() -> None:
    seen: list[Tensor] = []

    def network(images: Tensor, prompt: Prompt | None = None) -> Tensor:
        seen.append(images)
        return bright(images)

    shares: list[float] = []
    in_windows(network, BRIGHT, squares(64, 64), side=32, batch=4, done=shares.append)
    # Steps of 24 pixels: windows at 0, 24 and 32, in rows.
    assert [len(images) for images in seen] == [4, 4, 1]
    assert torch.equal(seen[0][1], BRIGHT(squares(64, 64)[0:32, 24:56]))
    assert shares == [56 / 64, 1, 1]


def test_where_windows_overlap_their_logits_are_averaged() -> None:
    def left_or_right(images: Tensor, prompt: Prompt | None = None) -> Tensor:
        """1 for the first window, -1 for the second: the second one begins in white."""
        sign = torch.where(images[:, :1, :1, :1] > 0, -1.0, 1.0)
        return sign.repeat(1, 1, SIDE, SIDE)

    picture = np.zeros((32, 56, 3), dtype=np.uint8)
    picture[:, 24:] = 255
    row = in_windows(left_or_right, BRIGHT, picture, side=32)[16]
    assert (row[:24] == 1).all()
    assert (row[32:] == -1).all()
    assert torch.allclose(row[24:32] + row[24:32].flip(0), torch.zeros(8), atol=1e-5)
    assert (row[24:32].diff() < 0).all()


def test_a_box_in_pixels_of_the_picture_is_that_box_in_the_mask() -> None:
    picture = np.zeros((64, 96, 3), dtype=np.uint8)  # a third of its size in the square
    places = Places.read(["12,24,48,60", "72,0,96,12"], [])
    assert places is not None
    prompt = places.prompt(["a"], (64, 96), BRIGHT)
    assert prompt.boxes is not None
    assert torch.allclose(
        prompt.boxes[0, 0], torch.tensor([4, 63 / 64 * 8, 16, 63 / 64 * 20]), 0.02
    )
    mask = (prompted(in_boxes, BRIGHT, picture, prompt) > 0).numpy()
    wanted = np.zeros((64, 96), dtype=bool)
    wanted[24:60, 12:48] = wanted[:12, 72:96] = True
    assert (mask == wanted).mean() > 0.97


def test_points_are_one_prompt_of_every_box(tmp_path: Path) -> None:
    table = tmp_path / "points.csv"
    table.write_text("image,x,y,label\nleft/a.png,8,4,1\nleft/a.png,0,0,0\nb,1,1,1\n")
    places = Places.read(["0,0,8,8", "8,8,16,16"], [str(table)])
    assert places is not None
    prompt = places.prompt(["left/a", "a"], (SIDE, SIDE), BRIGHT)
    assert prompt.points is not None
    assert prompt.labels is not None
    assert prompt.points.tolist() == [[[[8, 4], [0, 0]]] * 2]
    assert prompt.labels.tolist() == [[[1, 0]] * 2]
    alone = Places.read([], [str(table)])
    assert alone is not None
    with pytest.raises(AdaptError, match="c has no box and no point"):
        alone.prompt(["c"], (SIDE, SIDE), BRIGHT)


@pytest.mark.parametrize(
    ("boxes", "points", "said"),
    [
        (["1,2,3"], [], "--boxes: '1,2,3' is not x0,y0,x1,y1"),
        (["1,2,x,4"], [], "--boxes: '1,2,x,4' is not"),
        (["1,2,nan,4"], [], "--boxes: '1,2,nan,4' is not"),
        ([], ["1,2,7"], "--points: the label of 1,2,7 is 1"),
        ([], ["a.csv"], "cannot read a.csv"),
    ],
)
def test_places_that_are_none_are_refused(boxes: list[str], points: list[str], said: str) -> None:
    with pytest.raises(AdaptError, match=said):
        Places.read(boxes, points)


@pytest.mark.parametrize("box", ["5,5,4,9", "0,0,97,10", "-1,0,4,4", "0,60,10,65"])
def test_a_box_outside_of_the_picture_or_without_area_is_refused(box: str) -> None:
    places = Places.read([box], [])
    assert places is not None
    with pytest.raises(AdaptError, match=r"a is 96 x 64 pixels .*: .* is no place in it"):
        places.prompt(["a"], (64, 96), BRIGHT)


# Files of masks


def test_a_nifti_mask_has_its_scan_s_geometry_and_header(tmp_path: Path) -> None:
    affine = np.array([[0, -0.5, 0, 9], [0.25, 0, 0, -7], [0, 0, 3, 1], [0, 0, 0, 1.0]])
    made = nibabel.Nifti1Image(np.arange(24, dtype=np.int16).reshape(4, 3, 2), affine)
    made.header.set_xyzt_units("mm", "sec")
    made.header["descrip"] = b"a knee"
    made.header.set_slope_inter(2, -5)
    made.set_qform(affine, "scanner")
    nibabel.save(made, tmp_path / "knee.nii.gz")
    masks = [np.eye(3, 4, dtype=np.uint8), np.zeros((3, 4), dtype=np.uint8)]
    file = File.at(tmp_path / "knee.nii.gz")
    (tmp_path / "mask.nii.gz").write_bytes(mask_content(file, masks))
    back: Any = nibabel.load(tmp_path / "mask.nii.gz")
    assert back.get_data_dtype() == np.uint8
    assert back.shape == (4, 3, 2)
    original: Any = nibabel.load(file.path)
    assert np.array_equal(back.affine, original.affine)
    assert back.header["descrip"] == b"a knee"
    for name in ("qform_code", "sform_code", "pixdim", "xyzt_units"):
        assert np.array_equal(back.header[name], made.header[name])
    assert np.array_equal(np.asarray(back.dataobj)[..., 0], masks[0].T)
    assert mask_content(file, masks) == mask_content(file, masks)


def test_a_flat_nifti_file_keeps_its_two_axes(tmp_path: Path) -> None:
    file = as_nifti(tmp_path / "flat.nii", np.arange(12.0).reshape(4, 3))
    (tmp_path / "mask.nii").write_bytes(mask_content(file, [np.ones((3, 4), dtype=np.uint8)]))
    assert nibabel.load(tmp_path / "mask.nii").shape == (4, 3)  # type: ignore[attr-defined]


def test_a_dicom_mask_is_read_back_like_its_scan_and_knows_its_patient(tmp_path: Path) -> None:
    tags = {"RescaleIntercept": -1000, "RescaleSlope": 2, "WindowCenter": 40, "WindowWidth": 400}
    more = {"PatientID": "p7", "SOPInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2"}
    place = {"ImagePositionPatient": [1, 2, 3], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    values = np.arange(9, dtype=np.uint16).reshape(3, 3)  # an odd number of bytes
    scan = as_dicom(tmp_path / "a.dcm", values, **tags, **more, **place)
    mask = np.eye(3, dtype=np.uint8)
    (tmp_path / "m.dcm").write_bytes(mask_content(scan, [mask]))
    made = File.at(tmp_path / "m.dcm")
    assert np.array_equal(read_mask(made, of=read_picture(scan)), mask)
    header = pydicom.dcmread(made.path)
    assert (header.PatientID, header.ImagePositionPatient) == ("p7", [1, 2, 3])
    assert "WindowCenter" not in header
    assert "RescaleSlope" not in header
    assert header.SOPInstanceUID not in ("1.2.3", "")
    assert header.SeriesInstanceUID != "1.2"
    assert header.file_meta.MediaStorageSOPInstanceUID == header.SOPInstanceUID
    assert mask_content(scan, [mask]) == made.path.read_bytes()


def test_frames_of_dicom_have_a_mask_each(tmp_path: Path) -> None:
    scan = as_dicom(tmp_path / "a.dcm", np.arange(12, dtype=np.uint16).reshape(3, 2, 2))
    masks = [np.eye(2, dtype=np.uint8) * np.uint8(n % 2) for n in range(3)]
    (tmp_path / "m.dcm").write_bytes(mask_content(scan, masks))
    back = [read_mask(File(tmp_path, "m.dcm", layer)) for layer in range(3)]
    assert np.array_equal(back, masks)


# Which files


def saved(path: Path, value: int = 200) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 4, 3), value, dtype=np.uint8)).save(path)
    return path


def test_folders_patterns_and_files_are_found_once_and_keep_their_places(tmp_path: Path) -> None:
    for name in ("in/left/a.jpg", "in/b.png", "in/.hidden.png", "c.tif", "in/masks/old.png"):
        saved(tmp_path / name)
    out = tmp_path / "in/masks"
    words = [str(tmp_path / word) for word in ("in", "*.tif", "c.tif")]
    found = {job.name: job.mask for job in jobs_of(words, out)}
    assert found == {"b": out / "b.png", "left/a": out / "left/a.png", "c": out / "c.png"}


def test_names_that_fit_nothing_or_twice_are_refused(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a.png"), saved(tmp_path / "a.jpg")
    with pytest.raises(AdaptError, match="have one name: segment them apart"):
        jobs_of([str(first), str(second)], tmp_path / "out")
    with pytest.raises(AdaptError, match=r"no picture, folder or \.zip .*\*\.gif"):
        jobs_of([str(tmp_path / "*.gif")], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdaptError, match="holds no picture"):
        jobs_of([str(tmp_path / "empty")], tmp_path / "out")
    with pytest.raises(AdaptError, match="is not a folder"):
        jobs_of([str(first)], second)


def test_nothing_that_is_read_is_overwritten_by_any_of_its_names(tmp_path: Path) -> None:
    picture = saved(tmp_path / "a.png")
    link = tmp_path / "out" / "a.png"
    link.parent.mkdir()
    link.symlink_to(picture)
    (job,) = jobs_of([str(picture)], tmp_path / "out")
    with pytest.raises(AdaptError, match=r"out/a\.png is read: it would be overwritten"):
        refuse_overwriting([job.mask], [picture], tmp_path / "areas.csv")
    refuse_overwriting([tmp_path / "new.png"], [picture, tmp_path / "absent"], tmp_path / "t.csv")


def test_masks_that_no_run_has_written_are_not_overwritten(tmp_path: Path) -> None:
    drawn, table = saved(tmp_path / "masks/a.png"), tmp_path / "masks/areas.csv"
    with pytest.raises(AdaptError, match=r"masks/a\.png is there, .* may be drawn by hand"):
        refuse_overwriting([drawn], [], table)
    table.write_text("image\n")
    refuse_overwriting([drawn], [], table)


def test_true_masks_are_found_by_name_or_refused(tmp_path: Path) -> None:
    saved(tmp_path / "in/left/a.jpg")
    saved(tmp_path / "true/a_mask.png")
    jobs = jobs_of([str(tmp_path / "in")], tmp_path / "out")
    (job,) = with_truths(jobs, tmp_path / "true", "_mask")
    assert job.truth == File(tmp_path / "true", "a_mask.png")
    with pytest.raises(AdaptError, match=r"has no mask left/a in "):
        with_truths(jobs, tmp_path / "true")


def test_true_masks_beside_the_pictures_are_no_pictures(tmp_path: Path) -> None:
    for name in ("set/images/a.png", "set/masks/a.png", "flat/a.png", "flat/a_gt.png"):
        saved(tmp_path / name)
    for folder, masks, suffix in (("set", "set/masks", ""), ("flat", "flat", "_gt")):
        jobs = jobs_of([str(tmp_path / folder)], tmp_path / "out")
        (job,) = with_truths(jobs, tmp_path / masks, suffix)
        assert (job.file.stem, job.truth and job.truth.stem) == ("a", f"a{suffix}")
    (alone,) = jobs_of([str(tmp_path / "set/images")], tmp_path / "out")
    assert with_truths([alone], tmp_path / "set/images") == [replace(alone, truth=alone.file)]


# From files to masks


def test_one_file_that_cannot_be_read_does_not_stop_the_others(tmp_path: Path) -> None:
    words = [str(saved(tmp_path / f"{name}.png")) for name in "abc"]
    (tmp_path / "b.png").write_bytes(b"no picture")
    jobs = jobs_of(words, tmp_path / "out")
    for manner in (Manner(batch=2), Manner(window=4)):
        first, second, third = segment_all(bright, BRIGHT, jobs, manner)
        assert isinstance(second, Failed)
        assert second.job is jobs[1]
        for one, job in ((first, jobs[0]), (third, jobs[2])):
            assert not isinstance(one, Failed)
            assert one[0].job is job
            assert one[1].shape == (6, 4)
            assert one[1].all()


def test_the_threshold_is_the_probability_above_which_a_pixel_is_marked(tmp_path: Path) -> None:
    jobs = jobs_of([str(saved(tmp_path / "a.png", 255))], tmp_path / "out")  # a logit of 1: 0.731
    for threshold, marked in ((0.7, True), (0.75, False)):
        (found,) = segment_all(bright, BRIGHT, jobs, Manner(threshold=threshold))
        assert not isinstance(found, Failed)
        assert bool(found[1].all()) is marked
        assert bool(found[1].any()) is marked


def test_large_pictures_come_alone_however_large_the_batch(tmp_path: Path) -> None:
    Image.new("L", (8000, 2000)).save(tmp_path / "a.png")
    words = [str(tmp_path / "a.png"), *(str(saved(tmp_path / f"{n}.png")) for n in "bcd")]
    sizes = []

    def network(images: Tensor, prompt: Prompt | None = None) -> Tensor:
        sizes.append(len(images))
        return bright(images)

    jobs = jobs_of(words, tmp_path / "out")
    assert len(list(segment_all(network, BRIGHT, jobs, Manner(batch=8)))) == 4
    assert sizes == [1, 3]


def test_one_large_picture_is_gone_before_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a few pixels, which are large here."""
    monkeypatch.setattr(segmenting, "_MOST_PIXELS", 1)
    held: list[weakref.ref[Picture]] = []

    def read(file: File, window: tuple[float, float] | None) -> Picture:
        assert all(picture() is None for picture in held)
        picture = read_picture(file, window)
        held.append(weakref.ref(picture))
        return picture

    monkeypatch.setattr(segmenting, "read_picture", read)
    words = [str(saved(tmp_path / f"{name}.png")) for name in "abc"]
    for manner in (Manner(batch=8), Manner(window=4)):
        for found in segment_all(bright, BRIGHT, jobs_of(words, tmp_path / "out"), manner):
            assert not isinstance(found, Failed)
            del found
        held.clear()


def test_a_picture_that_pillow_finds_large_is_read_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "a.png")  # 24 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert read_picture(File.at(tmp_path / "a.png")).size == (6, 4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(AdaptError, match=r"cannot read the image .*exceeds limit of 20 pixels"):
        read_picture(File.at(tmp_path / "a.png"))
