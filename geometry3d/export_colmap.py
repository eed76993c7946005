"""A reconstruction as COLMAP's text files, for tools that begin with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..core.container import write_atomically
from ..core.errors import AdaptError
from .cameras import inverse_poses
from .cloud import Cloud, cloud_of
from .pictures_in import Part
from .quaternions import quaternion_of
from .reconstruction import Reconstruction


def write_colmap(
    scene: Reconstruction,
    folder: Path,
    parts: Sequence[Part] | None = None,
    above: float = 0.0,
    most: int | None = 100_000,
) -> int:
    """Write cameras.txt, images.txt and points3D.txt into `folder`; return how many points.

    cameras.txt has a SIMPLE_PINHOLE camera for each view, images.txt its world-to-camera rotation
    (quaternion w, x, y, z) and translation; both are of the original images with `parts` (what
    `read_pictures` found of them), else of the views. Every point is seen by the one view that it
    comes from. Numbers count from 1, a pixel's centre is at +0.5, as COLMAP has it.

    Raises AdaptError for a name with a line break, where the folder is not there, or not as many
    parts as views.
    """
    if parts is not None and len(parts) != len(scene):
        raise AdaptError(f"{len(parts)} parts of images are given for {len(scene)} views")
    require_names(scene.names)
    _, h, w = scene.depths.shape
    parts = [Part(w, h, 0.0, 0.0, 1.0)] * len(scene) if parts is None else parts
    cloud = cloud_of(scene, above, most)
    files = {
        "cameras.txt": _cameras(scene, parts, (h, w)),
        "images.txt": _images(scene, parts, cloud),
        "points3D.txt": _points(cloud),
    }
    for name, lines in files.items():
        write_atomically(folder / name, "\n".join([*lines, ""]).encode())
    return len(cloud.points)


def require_names(names: Sequence[str]) -> None:
    """Refuse names with a line break: in COLMAP's text files a line ends there."""
    broken = [name for name in names if "\n" in name or "\r" in name]
    if broken:
        raise AdaptError(f"COLMAP's text files have no place for the name {broken[0]!r}")


def _cameras(scene: Reconstruction, parts: Sequence[Part], size: tuple[int, int]) -> list[str]:
    lines = ["# CAMERA_ID MODEL WIDTH HEIGHT f cx cy"]
    for number, (part, focal) in enumerate(zip(parts, scene.focals.tolist(), strict=True), 1):
        x, y = part.centre_there(size)
        there = f"{part.focal_there(focal):.9g} {x:.9g} {y:.9g}"
        lines.append(f"{number} SIMPLE_PINHOLE {part.width} {part.height} {there}")
    return lines


def _images(scene: Reconstruction, parts: Sequence[Part], cloud: Cloud) -> list[str]:
    into = inverse_poses(scene.poses.double()).cpu()
    turns, shifts = quaternion_of(into[:, :3, :3]).tolist(), into[:, :3, 3].tolist()
    lines = ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then X Y POINT3D_ID of its points"]
    for view, part in enumerate(parts):
        pose = " ".join(f"{x:.9g}" for x in (*turns[view], *shifts[view]))
        lines.append(f"{view + 1} {pose} {view + 1} {scene.names[view]}")
        mine = (cloud.views == view).nonzero()[:, 0]
        places = (cloud.pixels[mine] + 0.5) / part.scale + torch.tensor([part.left, part.top])
        seen = zip(places.tolist(), (mine + 1).tolist(), strict=True)
        lines.append(" ".join(f"{x:.2f} {y:.2f} {point}" for (x, y), point in seen))
    return lines


def _points(cloud: Cloud) -> list[str]:
    """The place of a point among its view's is its place among those of its view in the cloud."""
    lines = ["# POINT3D_ID X Y Z R G B ERROR, then IMAGE_ID POINT2D_IDX"]
    counts: dict[int, int] = {}
    rows = zip(cloud.points.tolist(), cloud.colours.tolist(), cloud.views.tolist(), strict=True)
    for number, ((x, y, z), (r, g, b), view) in enumerate(rows, 1):
        index = counts.get(view, 0)
        counts[view] = index + 1
        lines.append(f"{number} {x:.9g} {y:.9g} {z:.9g} {r} {g} {b} 0 {view + 1} {index}")
    return lines
