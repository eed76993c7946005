"""A reconstruction as one HTML page that needs no network: drag to turn, wheel to come closer."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

from torch import Tensor

from ..core.container import write_atomically
from .cloud import cloud_of, frames_of
from .reconstruction import Reconstruction
from .viewer_page import PAGE


def write_viewer(
    scene: Reconstruction,
    path: Path,
    title: str = "Reconstruction",
    above: float = 0.0,
    most: int = 200_000,
) -> int:
    """Write the page with the points, the cameras' frames and names; return how many points.

    Everything is inside the file (20 bytes a point), drawn by WebGL; a list chooses a camera's own
    view. The file is written whole or not at all.
    """
    cloud = cloud_of(scene, above, most)
    h, w = scene.depths.shape[1:]
    data = {
        "points": _base64(cloud.points),
        "colours": _base64(cloud.colours),
        "frames": _base64(frames_of(scene)),
        "poses": _base64(scene.poses.float().cpu()),
        "openings": [h / 2 / focal for focal in scene.focals.tolist()],
        "aspect": w / h,
        "names": list(scene.names),
    }
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # no </script> in a name
    page = PAGE.replace("@TITLE@", html.escape(title)).replace("@DATA@", text)
    write_atomically(path, page.encode())
    return len(cloud.points)


def _base64(tensor: Tensor) -> str:
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode()
