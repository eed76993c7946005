"""Recordings in the layouts of Replica, TUM RGB-D and Waymo: read as they were written, or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d.cameras import inverse_poses
from polyadapt.geometry3d.layouts import plain, read_recording, replica, tum
from polyadapt.geometry3d.reconstruction import Reconstruction
from polyadapt.geometry3d.recordings import divided
from polyadapt.geometry3d.scenes.rooms import room
from polyadapt.tests.scene_files import write_plain, write_replica, write_tum

SIZE = (24, 32)


@pytest.fixture(scope="module")
def scene() -> Reconstruction:
    return room(6, views=4, size=SIZE, samples=1)


def _same_cameras_and_images(found: Reconstruction, wanted: Reconstruction) -> None:
    assert torch.equal(found.images, wanted.images)
    relative = inverse_poses(wanted.poses[:1]) @ wanted.poses
    torch.testing.assert_close(found.poses, relative, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("write", "step"), [(write_replica, 1 / 6553.5), (write_tum, 1 / 5000)], ids=["replica", "tum"]
)
def test_a_recording_with_depths_is_read_as_it_was_written(
    write: Callable[[Reconstruction, Path], None],
    step: float,
    scene: Reconstruction,
    tmp_path: Path,
) -> None:
    write(scene, tmp_path / "scene")
    recording = read_recording(tmp_path / "scene")
    found, parts = recording.load(range(4), SIZE)
    _same_cameras_and_images(found, scene)
    assert (found.depths - scene.depths).abs().max() <= 0.51 * step
    assert torch.equal(found.weights, torch.ones_like(found.weights))
    assert (parts[0].width, parts[0].height, parts[0].scale) == (32, 24, 1)


def test_a_plain_recording_has_poses_and_focals_and_no_depths(
    scene: Reconstruction, tmp_path: Path
) -> None:
    write_plain(scene, tmp_path / "segment")
    recording = read_recording(tmp_path / "segment")
    found, _ = recording.load([1, 2, 3], SIZE)
    _same_cameras_and_images(found, scene.of_views([1, 2, 3]))
    torch.testing.assert_close(found.focals, scene.focals[1:])
    assert not found.shown().any()


def test_a_smaller_view_has_the_focal_and_the_depths_of_its_pixels(
    scene: Reconstruction, tmp_path: Path
) -> None:
    write_replica(scene, tmp_path / "scene")
    found, parts = replica(tmp_path / "scene").load([0], (8, 8))
    # A third of the rows; 24 of 32 columns.
    assert (parts[0].left, parts[0].top) == (4, 0)
    assert parts[0].scale == pytest.approx(1 / 3)
    assert found.focals.item() == pytest.approx(32 / 3)
    torch.testing.assert_close(found.depths[0], scene.depths[0, 1::3, 5:29:3], atol=1e-4, rtol=0)


def test_tums_lens_is_told_by_the_folders_name(scene: Reconstruction, tmp_path: Path) -> None:
    write_tum(scene, tmp_path / "unnamed")
    assert tum(tmp_path / "unnamed").load([0], SIZE)[0].focals.isnan().all()
    write_tum(scene, tmp_path / "rgbd_dataset_freiburg2_xyz")
    frame = tum(tmp_path / "rgbd_dataset_freiburg2_xyz").frames[0]
    assert frame.focal == 520.95
    assert frame.centre == (325.6, 250.2)


def test_tums_images_go_with_what_is_near_in_time(scene: Reconstruction, tmp_path: Path) -> None:
    folder = tmp_path / "scene"
    write_tum(scene, folder)
    lines = (folder / "depth.txt").read_text().splitlines()
    late = lines[2].replace("100.104", "100.125")  # 25 ms after its image
    (folder / "depth.txt").write_text("\n".join([*lines[:2], late, *lines[3:]]))
    assert [frame.image.name for frame in tum(folder).frames] == ["0.png", "2.png", "3.png"]
    (folder / "depth.txt").unlink()
    assert [frame.depth for frame in tum(folder).frames] == [None] * 4
    (folder / "groundtruth.txt").write_text("5.0 0 0 0 0 0 0 1")
    with pytest.raises(AdaptError, match=r"none of .* 4 images has a depth and a pose within 0.02"):
        tum(folder)


def test_a_recording_far_from_its_origin_keeps_its_millimetres(
    scene: Reconstruction, tmp_path: Path
) -> None:
    folder = tmp_path / "segment"
    write_plain(scene, folder)
    rows = [line.split() for line in (folder / "frames.txt").read_text().splitlines()]
    for row in rows:
        row[8] = repr(float(row[8]) + 4e6)  # the x of the camera's centre, in metres
    (folder / "frames.txt").write_text("\n".join(" ".join(row) for row in rows))
    _same_cameras_and_images(plain(folder).load(range(4), SIZE)[0], scene)


def test_replica_without_a_camera_file_has_the_usual_one_or_is_refused(
    scene: Reconstruction, tmp_path: Path
) -> None:
    folder = tmp_path / "office0"
    write_replica(scene, folder)
    (folder / "cam_params.json").unlink()
    with pytest.raises(AdaptError, match="images of 32x24 are not the usual 1200x680"):
        replica(folder)
    for view in range(4):
        Image.new("RGB", (1200, 680)).save(folder / "results" / f"frame{view:06}.png")
    frame = replica(folder).frames[0]
    assert (frame.focal, frame.centre) == (600, (600, 340))
    with pytest.raises(AdaptError, match=r"depth000000.png has 32x24 pixels, its image 1200x680"):
        replica(folder).load([0], SIZE)
    (folder / "cam_params.json").write_text('{"camera": {"fx": 3}}')
    with pytest.raises(AdaptError, match="does not describe a camera"):
        replica(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("1 2 3", "line 4: 3 entries, 16 are wanted"),
        (" ".join(["x", *"100001000010001"]), "line 4: 'x' is no number"),
        (" ".join(["nan", *"100001000010001"]), "line 4: 'nan' is not finite"),
        (" ".join("2000020000200001"), "line 4: the 16 numbers are no pose"),
        (" ".join([*"1000010000", "-1", *"00001"]), "line 4: the 16 numbers are no pose"),
        ("", "has 4 frames, 4 depths and 3 poses"),
    ],
    ids=["few", "word", "nan", "scaled", "mirrored", "missing"],
)
def test_poses_that_are_none_are_refused_by_their_line(
    change: str, said: str, scene: Reconstruction, tmp_path: Path
) -> None:
    write_replica(scene, tmp_path / "scene")
    path = tmp_path / "scene" / "traj.txt"
    path.write_text("\n".join([*path.read_text().splitlines()[:3], change]))
    with pytest.raises(AdaptError, match=said):
        replica(tmp_path / "scene")


def test_plain_lines_and_folders_that_are_none_are_refused(
    scene: Reconstruction, tmp_path: Path
) -> None:
    with pytest.raises(AdaptError, match=r"is no recording: traj.txt"):
        read_recording(tmp_path)
    with pytest.raises(AdaptError, match="there is no folder"):
        read_recording(tmp_path / "absent")
    write_plain(scene, tmp_path / "scene")
    lines = (tmp_path / "scene" / "frames.txt").read_text()
    (tmp_path / "scene" / "2.png").unlink()
    with pytest.raises(AdaptError, match="line 3: there is no image"):
        plain(tmp_path / "scene")
    (tmp_path / "scene" / "frames.txt").write_text(lines.replace("0.png 32.0", "0.png 0"))
    with pytest.raises(AdaptError, match="line 1: focals of 0 and 32"):
        plain(tmp_path / "scene")
    (tmp_path / "scene" / "frames.txt").write_text("# nothing\n")
    with pytest.raises(AdaptError, match="has no frame"):
        plain(tmp_path / "scene")


def test_depths_that_cannot_be_read_are_named(scene: Reconstruction, tmp_path: Path) -> None:
    write_replica(scene, tmp_path / "scene")
    recording = replica(tmp_path / "scene")
    path = tmp_path / "scene" / "results" / "depth000001.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(AdaptError, match=r"cannot read the depths .*depth000001"):
        recording.load([0, 1], SIZE)
    Image.new("RGB", (32, 24)).save(path)
    with pytest.raises(AdaptError, match=r"depth000001\.png is no depth map"):
        recording.load([1], SIZE)
    with pytest.raises(AdaptError, match="no frame of scene is chosen"):
        recording.load([], SIZE)


def test_frames_to_calibrate_on_are_never_tested_on() -> None:
    for many, calibrating, testing in ((2000, 10, 20), (12, 10, 2), (7, 3, 4), (5, 5, 0)):
        learnt, tested = divided(many, calibrating, testing)
        assert (len(learnt), len(tested)) == (calibrating, testing)
        assert len({*learnt, *tested}) == calibrating + testing
        assert set(learnt + tested) <= set(range(many))
    with pytest.raises(
        AdaptError, match="10 frames to calibrate on and 20 to test on: there are 9"
    ):
        divided(9, 10, 20)
