"""A reconstruction's points and cameras as one binary glTF 2.0 file (.glb)."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.container import write_atomically
from .cloud import cloud_of, frames_of
from .reconstruction import Reconstruction

_FLOAT, _SHORT, _POINTS, _LINES, _VERTICES = 5126, 5123, 0, 1, 34962
_FLIP = [1.0, -1.0, -1.0]  # glTF's y points up and its cameras look along -z


def write_glb(
    scene: Reconstruction, path: Path, above: float = 0.0, most: int | None = None
) -> int:
    """Write the points (mode POINTS), the cameras' frames (LINES) and cameras; how many points.

    The world's node turns OpenCV's axes into glTF's, the points themselves are unchanged. Colours
    are linear, as glTF wants them. The file is written whole or not at all.
    """
    cloud = cloud_of(scene, above, most)
    frames = frames_of(scene).reshape(-1, 3)
    parts = [cloud.points, _linear(cloud.colours), frames]
    body = b"".join(part.numpy().tobytes() for part in parts)
    text = json.dumps(_document(scene, parts, len(body)), allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    total = 12 + 8 + len(text) + 8 + len(body)
    write_atomically(
        path,
        struct.pack("<4sII", b"glTF", 2, total),
        struct.pack("<I4s", len(text), b"JSON") + text,
        struct.pack("<I4s", len(body), b"BIN\0") + body,
    )
    return len(cloud.points)


def _linear(colours: Tensor) -> Tensor:
    """sRGB [p, 3] of 8 bits -> linear RGBA [p, 4] of 16 bits."""
    c = colours.double() / 255
    light = torch.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    opaque = torch.cat([light, torch.ones_like(light[:, :1])], 1)
    return torch.from_numpy((opaque * 65535).round().numpy().astype(np.uint16))


def _document(scene: Reconstruction, parts: list[Tensor], size: int) -> dict[str, Any]:
    views, accessors, begin = [], [], 0
    for number, part in enumerate(parts):
        length = part.numel() * part.element_size()
        views.append({"buffer": 0, "byteOffset": begin, "byteLength": length, "target": _VERTICES})
        accessors.append(_accessor(number, part))
        begin += length
    cameras = range(len(scene))
    unlit: dict[str, Any] = {"extensions": {"KHR_materials_unlit": {}}}
    points = {"attributes": {"POSITION": 0, "COLOR_0": 1}, "mode": _POINTS, "material": 0}
    frames = {"attributes": {"POSITION": 2}, "mode": _LINES, "material": 0}
    children = list(range(1, 3 + len(scene)))
    half_turn = [1.0, 0.0, 0.0, 0.0]  # about x, as x, y, z, w
    world = {"name": "world", "rotation": half_turn, "children": children}
    nodes = [world, {"name": "points", "mesh": 0}, {"name": "frames", "mesh": 1}]
    return {
        "asset": {"version": "2.0", "generator": "polyadapt"},
        "extensionsUsed": ["KHR_materials_unlit"],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": nodes + [_camera_node(scene, i) for i in cameras],
        "cameras": [_camera(scene, i) for i in cameras],
        "meshes": [{"primitives": [points]}, {"primitives": [frames]}],
        "materials": [unlit],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": size}],
    }


def _accessor(number: int, part: Tensor) -> dict[str, Any]:
    made = {"bufferView": number, "count": len(part), "type": f"VEC{part.shape[1]}"}
    if part.dtype == torch.float32:
        low, high = part.amin(0).tolist(), part.amax(0).tolist()
        return {**made, "componentType": _FLOAT, "min": low, "max": high}
    return {**made, "componentType": _SHORT, "normalized": True}


def _camera_node(scene: Reconstruction, number: int) -> dict[str, Any]:
    matrix = scene.poses[number].double() @ torch.diag(torch.tensor([*_FLIP, 1.0])).double()
    columns = matrix.T.flatten().tolist()  # glTF writes matrices by columns
    return {"name": scene.names[number], "camera": number, "matrix": columns}


def _camera(scene: Reconstruction, number: int) -> dict[str, Any]:
    _, h, w = scene.depths.shape
    opening = 2 * math.atan(h / 2 / float(scene.focals[number]))
    return {
        "type": "perspective",
        "perspective": {"yfov": opening, "aspectRatio": w / h, "znear": 0.01},
    }
