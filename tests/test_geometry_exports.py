"""What is written of a reconstruction is read back: PLY, glTF, COLMAP's text, the viewer's page."""

from __future__ import annotations

import base64
import html
import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d.cloud import cloud_of, frames_of
from polyadapt.geometry3d.export_colmap import write_colmap
from polyadapt.geometry3d.export_gltf import write_glb
from polyadapt.geometry3d.export_ply import write_ply
from polyadapt.geometry3d.pictures_in import view_of
from polyadapt.geometry3d.quaternions import quaternion_of, rotation_from
from polyadapt.geometry3d.reconstruction import Reconstruction
from polyadapt.geometry3d.scenes.rooms import room
from polyadapt.geometry3d.viewer import write_viewer

WRITERS = [write_ply, write_glb, write_viewer]
by_writer = pytest.mark.parametrize("write", WRITERS, ids=lambda write: str(write.__name__))


def _scene() -> Reconstruction:
    """Three views of a room in which a box, of weight 0, moves."""
    return room(5, "moving", views=3, size=(12, 16))


def test_a_cloud_holds_the_shown_points_with_their_colours_and_places() -> None:
    scene = _scene()
    cloud = cloud_of(scene)
    assert len(cloud.points) == int((scene.weights > 0).sum()) < 3 * 12 * 16
    view, (column, row) = int(cloud.views[100]), cloud.pixels[100].tolist()
    assert torch.equal(cloud.points[100], scene.points()[view, row, column])
    colour = (scene.images[view, :, row, column] * 255).round()
    assert cloud.colours[100].tolist() == colour.tolist()
    assert len(cloud_of(scene, most=50).points) == 50
    with pytest.raises(AdaptError, match="no point has a weight above 1"):
        cloud_of(scene, above=1)
    with pytest.raises(AdaptError, match="unknown focals"):
        cloud_of(replace(scene, focals=scene.focals * torch.nan))


def test_a_cameras_frame_begins_at_its_centre_and_shows_its_image() -> None:
    scene = _scene()
    lines = frames_of(scene).view(3, 8, 2, 3)
    torch.testing.assert_close(lines[:, :4, 0], scene.poses[:, None, :3, 3].expand(-1, 4, -1))
    local = (lines[1, :4, 1] - scene.poses[1, :3, 3]) @ scene.poses[1, :3, :3]
    away = 0.1 * scene.depths[scene.shown()].median()
    torch.testing.assert_close(local[:, 2], away.expand(4))
    torch.testing.assert_close(local[2, :2], away * torch.tensor([8, 6]) / scene.focals[1])
    torch.testing.assert_close(lines[:, 7, 1], lines[:, 0, 1])  # around the image


def test_a_ply_file_has_every_point_and_colour(tmp_path: Path) -> None:
    path, scene = tmp_path / "a.ply", _scene()
    count = write_ply(scene, path)
    header, body = path.read_bytes().split(b"end_header\n", 1)
    lines = header.decode().splitlines()
    assert lines[:3] == ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    assert [line.split()[2] for line in lines[3:]] == ["x", "y", "z", "red", "green", "blue"]
    read = np.frombuffer(body, np.dtype([("place", "<f4", 3), ("colour", "u1", 3)]))
    cloud = cloud_of(scene)
    assert np.array_equal(read["place"], cloud.points.numpy())
    assert np.array_equal(read["colour"], cloud.colours.numpy())


def _glb(path: Path) -> tuple[dict[str, Any], list[np.ndarray[Any, Any]]]:
    """The document of a .glb file and its accessors' values; chunks are checked."""
    content = path.read_bytes()
    magic, version, total, length, kind = struct.unpack_from("<4sII I4s", content)
    assert (magic, version, total, kind) == (b"glTF", 2, len(content), b"JSON")
    document = json.loads(content[20 : 20 + length])
    size, second = struct.unpack_from("<I4s", content, 20 + length)
    assert (second, length % 4, size % 4) == (b"BIN\0", 0, 0)
    body = content[28 + length :]
    assert len(body) == size == document["buffers"][0]["byteLength"]
    values = []
    for accessor in document["accessors"]:
        place = document["bufferViews"][accessor["bufferView"]]
        part = body[place["byteOffset"] : place["byteOffset"] + place["byteLength"]]
        kind = {5126: "<f4", 5123: "<u2"}[accessor["componentType"]]
        width = int(accessor["type"].removeprefix("VEC"))
        values.append(np.frombuffer(part, kind).reshape(accessor["count"], width))
    return document, values


def test_a_gltf_file_has_points_frames_and_bounds(tmp_path: Path) -> None:
    path, scene = tmp_path / "a.glb", _scene()
    count = write_glb(scene, path)
    document, (points, colours, frames) = _glb(path)
    cloud = cloud_of(scene)
    assert len(points) == count
    assert np.array_equal(points, cloud.points.numpy())
    assert np.array_equal(frames, frames_of(scene).reshape(-1, 3).numpy())
    light = colours[:, :3] / 65535
    shown = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(shown * 255 - cloud.colours.numpy()).max() < 0.1
    assert colours[:, 3].min() == 65535
    bounds = document["accessors"][0]
    assert bounds["min"] == points.min(0).tolist()
    assert bounds["max"] == points.max(0).tolist()
    assert [mesh["primitives"][0]["mode"] for mesh in document["meshes"]] == [0, 1]


def test_gltf_cameras_stand_and_look_as_ours_do(tmp_path: Path) -> None:
    scene = _scene()
    write_glb(scene, tmp_path / "a.glb")
    document, _ = _glb(tmp_path / "a.glb")
    world, *rest = document["nodes"]
    flip = Rotation.from_quat(world["rotation"]).as_matrix()  # x, y, z, w
    np.testing.assert_allclose(flip, np.diag([1, -1, -1]), atol=1e-12)
    assert world["children"] == list(range(1, len(document["nodes"])))
    for view, node in enumerate(rest[2:]):
        placed = np.array(node["matrix"]).reshape(4, 4).T
        # In glTF a camera looks along -z, and its y points up.
        np.testing.assert_allclose(-placed[:3, 2], scene.poses[view, :3, 2], atol=1e-6)
        np.testing.assert_allclose(-placed[:3, 1], scene.poses[view, :3, 1], atol=1e-6)
        np.testing.assert_allclose(placed[:3, 3], scene.poses[view, :3, 3], atol=1e-6)
        lens = document["cameras"][node["camera"]]["perspective"]
        assert np.tan(lens["yfov"] / 2) == pytest.approx(6 / 16)
        assert lens["aspectRatio"] == pytest.approx(16 / 12)


def _colmap(folder: Path) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    """The words of each line of cameras.txt, images.txt and points3D.txt."""
    cameras, images, points = (
        [line.split() for line in (folder / f"{name}.txt").read_text().split("\n")[:-1]]
        for name in ("cameras", "images", "points3D")
    )
    return cameras[1:], images[1:], points[1:]


def test_colmap_sees_every_point_where_its_cameras_put_it(tmp_path: Path) -> None:
    scene = _scene()
    # The views were a third of originals, which were higher than the views show.
    parts = [view_of(Image.new("RGB", (48, 60)), (12, 16))[1]] * 3
    count = write_colmap(scene, tmp_path, parts)
    cameras, images, points = _colmap(tmp_path)
    assert (len(cameras), len(images), len(points)) == (3, 6, count)
    assert cameras[0][1:] == ["SIMPLE_PINHOLE", "48", "60", "48", "24", "30"]
    place = {words[0]: [float(x) for x in words[1:4]] for words in points}
    track = {words[0]: (words[8], int(words[9])) for words in points}
    for camera, pose, seen in zip(cameras, images[::2], images[1::2], strict=True):
        f, x, y = (float(word) for word in camera[4:])
        w, *rest = (float(word) for word in pose[1:5])
        turn, shift = Rotation.from_quat([*rest, w]), [float(word) for word in pose[5:8]]
        triples = np.array(seen).reshape(-1, 3)
        local = turn.apply([place[number] for number in triples[:, 2]]) + shift
        pixels = f * local[:, :2] / local[:, 2:] + [x, y]
        assert np.abs(pixels - triples[:, :2].astype(float)).max() < 0.01
        assert [track[number] for number in triples[:, 2]] == [
            (pose[0], index) for index in range(len(triples))
        ]
        assert pose[8] == camera[0]
        assert pose[9] == scene.names[int(pose[0]) - 1]


def test_colmap_refuses_what_its_lines_cannot_hold(tmp_path: Path) -> None:
    scene = _scene()
    with pytest.raises(AdaptError, match="no place for the name"):
        write_colmap(replace(scene, names=["a", "b\nc", "d"]), tmp_path)
    with pytest.raises(AdaptError, match="1 parts of images are given for 3 views"):
        write_colmap(scene, tmp_path, [view_of(Image.new("RGB", (16, 12)), (12, 16))[1]])
    with pytest.raises(AdaptError, match="does not exist"):
        write_colmap(scene, tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def _decoded(text: str, kind: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), kind).copy())


def test_the_viewer_is_one_page_with_everything_inside(tmp_path: Path) -> None:
    path, scene = tmp_path / "a.html", _scene()
    count = write_viewer(scene, path, title="A <room> & more")
    page = path.read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data = json.loads(found[1])
    cloud = cloud_of(scene)
    assert torch.equal(_decoded(data["points"], "<f4").view(count, 3), cloud.points)
    assert torch.equal(_decoded(data["colours"], "u1").view(count, 3), cloud.colours)
    assert torch.equal(_decoded(data["frames"], "<f4").view(-1, 2, 3), frames_of(scene))
    assert torch.equal(_decoded(data["poses"], "<f4").view(3, 4, 4), scene.poses)
    assert data["openings"] == pytest.approx([6 / 16] * 3)
    assert f"<title>{html.escape('A <room> & more')}</title>" in page
    # Nothing is fetched from anywhere.
    assert not re.search(r"https?:|//[a-z]|\bsrc=|\bhref=|@import|url\(|fetch|import\(", page)


def test_a_name_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    names = ["</script><script>alert(1)</script>", "<b>", "c"]
    write_viewer(replace(_scene(), names=names), tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.count("</script>") == 2
    assert "<b>" not in page


@by_writer
def test_a_write_that_fails_leaves_what_was_there(
    write: Callable[..., int], tmp_path: Path
) -> None:
    path = tmp_path / "kept"
    path.write_text("before")
    with pytest.raises(AdaptError, match="nothing to write"):
        write(_scene(), path, above=5)
    with pytest.raises(AdaptError, match="does not exist"):
        write(_scene(), tmp_path / "absent" / "a")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]
    assert write(_scene(), path, most=10) == 10
    assert path.read_bytes() != b"before"


def test_quaternions_are_scipys_and_lead_back() -> None:
    turns = Rotation.random(50, random_state=3)
    matrices = torch.from_numpy(turns.as_matrix())
    half_turns = torch.stack([2 * torch.outer(a, a) for a in torch.eye(3).double()])
    matrices = torch.cat([matrices, half_turns - torch.eye(3), torch.eye(3)[None].double()])
    found = quaternion_of(matrices)
    wanted = torch.from_numpy(turns.as_quat(canonical=True))[:, [3, 0, 1, 2]]
    torch.testing.assert_close(found[:50], wanted)
    torch.testing.assert_close(found[50:].abs(), torch.eye(4).double()[[1, 2, 3, 0]])
    torch.testing.assert_close(rotation_from(3 * found), matrices)
