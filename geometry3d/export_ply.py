"""A reconstruction's points as a binary PLY file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..core.container import write_atomically
from .cloud import cloud_of
from .reconstruction import Reconstruction

_RECORD = np.dtype([("place", "<f4", 3), ("colour", "u1", 3)])


def write_ply(
    scene: Reconstruction, path: Path, above: float = 0.0, most: int | None = None
) -> int:
    """Write x, y, z (fp32) and red, green, blue of each point; return how many there are.

    Points are in the reconstruction's world (OpenCV axes: y down); `above` and `most` as in
    `cloud_of`. The file is written whole or not at all.
    """
    cloud = cloud_of(scene, above, most)
    records = np.empty(len(cloud.points), _RECORD)
    records["place"], records["colour"] = cloud.points.numpy(), cloud.colours.numpy()
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(records)}"]
    lines += [f"property float {name}" for name in "xyz"]
    lines += [f"property uchar {name}" for name in ("red", "green", "blue")]
    write_atomically(path, "\n".join([*lines, "end_header\n"]).encode(), records.tobytes())
    return len(records)
