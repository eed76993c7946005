"""Recordings as Replica, TUM RGB-D and a plain layout (for Waymo) lay them out in folders."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..core.errors import AdaptError
from ..core.images.preprocessing import open_image
from .cameras import pose
from .quaternions import rotation_from
from .recordings import Frame, Recording

REPLICA_SCALE, TUM_SCALE = 6553.5, 5000.0
_REPLICA_SIZE, _REPLICA_LENS = (1200, 680), (600.0, (600.0, 340.0))
# Mean focal and principal point of TUM's three Kinects, which count pixels from their centres.
_TUM_LENSES = {
    1: (516.9, (319.1, 255.8)),
    2: (520.95, (325.6, 250.2)),
    3: (537.3, (320.6, 248.1)),
}
_TOGETHER = 0.02  # seconds
T = TypeVar("T")


def read_recording(folder: Path) -> Recording:
    """A folder in one of the three layouts, told by the file of poses in it.

    Raises AdaptError where there is none, or what the layout's own reader refuses.
    """
    if not folder.is_dir():
        raise AdaptError(f"there is no folder {folder}")
    for name, reader in (("traj.txt", replica), ("groundtruth.txt", tum), ("frames.txt", plain)):
        if (folder / name).is_file():
            return reader(folder)
    raise AdaptError(
        f"{folder} is no recording: traj.txt (Replica), groundtruth.txt (TUM RGB-D) or frames.txt"
        " (plain) is wanted in it"
    )


def replica(folder: Path) -> Recording:
    """Replica as NICE-SLAM renders it: results/frame*.jpg, results/depth*.png, traj.txt.

    traj.txt has 16 numbers a line, camera to world; depths are metres times 6553.5. The camera is
    cam_params.json's, in the folder or above it ({"camera": {"fx", "fy", "cx", "cy", "scale"}});
    without one, images have to be the usual 1200x680 with a focal of 600.

    Raises AdaptError for missing files, other numbers of images, depths and poses, and lines that
    are no pose.
    """
    images = _numbered(folder / "results", "frame")
    depths = _numbered(folder / "results", "depth")
    poses = [_matrix(numbers, where) for _, numbers, where in _lines(folder / "traj.txt", 0, 16)]
    if not len(images) == len(depths) == len(poses) or not poses:
        raise AdaptError(
            f"{folder} has {len(images)} frames, {len(depths)} depths and {len(poses)} poses:"
            " as many of each are wanted"
        )
    focal, centre, scale = _replica_lens(folder, images[0])
    frames = [
        Frame(image, found, depth, focal, centre)
        for image, depth, found in zip(images, depths, poses, strict=True)
    ]
    return Recording(folder.name, frames, scale)


def _numbered(folder: Path, name: str) -> list[Path]:
    """Files like frame000123.jpg, by their number."""
    found = [(re.fullmatch(rf"{name}(\d+)\.(?:jpg|jpeg|png)", f.name), f) for f in _files(folder)]
    return [f for _, f in sorted((int(match[1]), f) for match, f in found if match)]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise AdaptError(f"there is no folder {folder}")
    return sorted(folder.iterdir())


def _replica_lens(folder: Path, first: Path) -> tuple[float, tuple[float, float], float]:
    """(focal, principal point, scale of depths)."""
    above = [place / "cam_params.json" for place in (folder, folder.parent)]
    path = next((place for place in above if place.is_file()), None)
    if path is None:
        size = open_image(first).size
        if size != _REPLICA_SIZE:
            raise AdaptError(
                f"{folder} has no cam_params.json, and its images of {size[0]}x{size[1]} are not"
                " the usual 1200x680"
            )
        return *_REPLICA_LENS, REPLICA_SCALE
    try:
        camera = json.loads(path.read_text())["camera"]
        fx, fy, cx, cy = (float(camera[name]) for name in ("fx", "fy", "cx", "cy"))
        return (fx + fy) / 2, (cx + 0.5, cy + 0.5), float(camera.get("scale", REPLICA_SCALE))
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise AdaptError(f"{path} does not describe a camera by fx, fy, cx, cy") from error


def tum(folder: Path) -> Recording:
    """TUM RGB-D: rgb.txt and depth.txt (`timestamp file`), groundtruth.txt.

    groundtruth.txt has `timestamp tx ty tz qx qy qz qw`, camera to world; depths are metres times
    5000. An image goes with the depth and the pose that are nearest in time, at most 0.02 s away;
    images without are left out. depth.txt may be missing. The lens is the one that the data set
    publishes for freiburg 1, 2 or 3, told by the folder's name (its distortion is left as it is);
    else focals are not known.

    Raises AdaptError for missing files, lines that are not so, and where nothing goes together.
    """
    images = _timed_files(folder / "rgb.txt")
    has_depth = (folder / "depth.txt").is_file()
    depths = _timed_files(folder / "depth.txt") if has_depth else []
    rows = _timed_poses(folder / "groundtruth.txt")
    lens = _tum_lens(folder.name)
    frames = []
    for time, image in images:
        place, depth = _nearest(rows, time), _nearest(depths, time)
        if place is not None and (depth is not None or not has_depth):
            frames.append(Frame(image, place, depth, *lens))
    if not frames:
        raise AdaptError(
            f"none of {folder}'s {len(images)} images has a depth and a pose within"
            f" {_TOGETHER} s: {len(depths)} depths, {len(rows)} poses"
        )
    return Recording(folder.name, frames, TUM_SCALE)


def _timed_files(path: Path) -> list[tuple[float, Path]]:
    found = []
    for words, _, where in _lines(path, 2, 0):
        found.append((_number(words[0], where), path.parent / words[1]))
    return sorted(found)


def _timed_poses(path: Path) -> list[tuple[float, Tensor]]:
    found = []
    for _, (time, x, y, z, *turn), where in _lines(path, 0, 8):
        i, j, k, w = turn
        quaternion = torch.tensor([w, i, j, k], dtype=torch.float64)
        if not 0.9 < float(quaternion.norm()) < 1.1:
            raise AdaptError(f"{where}: qx qy qz qw are no unit quaternion")
        centre = torch.tensor([x, y, z], dtype=torch.float64)
        found.append((time, pose(rotation_from(quaternion), centre)))
    return sorted(found, key=lambda row: row[0])


def _nearest(rows: Sequence[tuple[float, T]], time: float) -> T | None:
    """What is nearest in time, if it is near enough; rows are in the order of time."""
    after = bisect_left(rows, time, key=lambda row: row[0])
    near = [(abs(t - time), i) for i, (t, _) in enumerate(rows[max(after - 1, 0) : after + 1])]
    if not near or min(near)[0] > _TOGETHER:
        return None
    return rows[max(after - 1, 0) + min(near)[1]][1]


def _tum_lens(name: str) -> tuple[float | None, tuple[float, float] | None]:
    found = re.search(r"(?:freiburg|fr)([123])", name)
    return _TUM_LENSES[int(found[1])] if found else (None, None)


def plain(folder: Path) -> Recording:
    """One line a frame in frames.txt: `image fx fy cx cy` and 16 numbers, camera to world.

    Images are files in the folder; a pixel's centre is at +0.5; lines are in the order of time. It
    is how extracted Waymo segments are read (the original needs TensorFlow's files). Waymo's
    cameras look along x with y to the left and z up, so that with the frame's pose V (vehicle to
    world) and the camera's extrinsic E (camera to vehicle) a line's matrix is

        V E A,  A = [[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]],

    and f_u, f_v, c_u, c_v are its first four intrinsics. There are no depths, and distortion is
    not undone.

    Raises AdaptError for missing files and lines that are not so.
    """
    frames = []
    for words, numbers, where in _lines(folder / "frames.txt", 1, 20):
        fx, fy, cx, cy, *matrix = numbers
        image = folder / words[0]
        if not image.is_file():
            raise AdaptError(f"{where}: there is no image {image}")
        if not min(fx, fy) > 0:
            raise AdaptError(f"{where}: focals of {fx:g} and {fy:g}: they are above 0")
        frames.append(Frame(image, _matrix(matrix, where), None, (fx + fy) / 2, (cx, cy)))
    if not frames:
        raise AdaptError(f"{folder / 'frames.txt'} has no frame")
    return Recording(folder.name, frames)


def _lines(path: Path, words: int, numbers: int) -> list[tuple[list[str], list[float], str]]:
    """(words, numbers, where) of each line that is not empty and no # comment."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise AdaptError(f"cannot read {path}: {error}") from error
    found = []
    for count, line in enumerate(text.splitlines(), 1):
        parts, where = line.split(), f"{path}, line {count}"
        if not parts or parts[0].startswith("#"):
            continue
        if len(parts) != words + numbers:
            raise AdaptError(f"{where}: {len(parts)} entries, {words + numbers} are wanted")
        found.append((parts[:words], [_number(part, where) for part in parts[words:]], where))
    return found


def _number(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise AdaptError(f"{where}: {text!r} is no number") from error
    if not math.isfinite(number):
        raise AdaptError(f"{where}: {text!r} is not finite")
    return number


def _matrix(numbers: Sequence[float], where: str) -> Tensor:
    """16 numbers by rows as a pose; its rotation made exact where it is one to within 1 %."""
    matrix = torch.tensor(numbers, dtype=torch.float64).view(4, 4)
    turn = matrix[:3, :3]
    off = (turn @ turn.T - torch.eye(3).double()).abs().max()
    if off > 0.01 or torch.linalg.det(turn) < 0 or matrix[3].tolist() != [0, 0, 0, 1]:
        raise AdaptError(f"{where}: the 16 numbers are no pose (rotation, centre, 0 0 0 1)")
    left, _, right = torch.linalg.svd(turn)
    return pose(left @ right, matrix[:3, 3])
