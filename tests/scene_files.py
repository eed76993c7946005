"""Generated scenes as files: images and depths, alone and in the layouts of data sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation
from torch import Tensor

from polyadapt.geometry3d.reconstruction import Reconstruction


def save_image(image: Tensor, path: Path, mode: str = "RGB") -> None:
    """[3, h, w] in 0..1, to the nearest of 8 bits."""
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).convert(mode).save(path)


def save_images(images: Tensor, folder: Path, mode: str = "RGB") -> Path:
    """0.png, 1.png, ... in a new folder."""
    folder.mkdir()
    for number, image in enumerate(images):
        save_image(image, folder / f"{number}.png", mode)
    return folder


def save_depth(depth: Tensor, path: Path, scale: float) -> None:
    """[h, w] as 16 bits of 1 / scale."""
    Image.fromarray((depth * scale).round().numpy().astype(np.uint16)).save(path)


def write_replica(scene: Reconstruction, folder: Path) -> None:
    """As NICE-SLAM renders Replica, with a camera file."""
    results = folder / "results"
    results.mkdir(parents=True)
    for view, image in enumerate(scene.images):
        save_image(image, results / f"frame{view:06}.png")
        save_depth(scene.depths[view], results / f"depth{view:06}.png", 6553.5)
    _, h, w = scene.depths.shape
    focal = float(scene.focals[0])
    camera = {"fx": focal, "fy": focal, "cx": w / 2 - 0.5, "cy": h / 2 - 0.5, "scale": 6553.5}
    (folder / "cam_params.json").write_text(json.dumps({"camera": camera}))
    rows = [" ".join(map(str, pose.flatten().tolist())) for pose in scene.poses.double()]
    (folder / "traj.txt").write_text("\n".join(rows))


def write_tum(scene: Reconstruction, folder: Path) -> None:
    """As TUM RGB-D: images every 0.1 s, depths 4 ms later, poses every 50 ms, 3 ms late."""
    for name in ("rgb", "depth"):
        (folder / name).mkdir(parents=True)
    rgb, depth, truth = (["# timestamp and more"] for _ in range(3))
    for view, image in enumerate(scene.images):
        time = 100 + view / 10
        save_image(image, folder / "rgb" / f"{view}.png")
        save_depth(scene.depths[view], folder / "depth" / f"{view}.png", 5000.0)
        rgb.append(f"{time:.6f} rgb/{view}.png")
        depth.append(f"{time + 0.004:.6f} depth/{view}.png")
        for lag, shift in ((0.003, 0.0), (0.053, 9.0)):
            place = " ".join(str(x + shift) for x in scene.poses[view, :3, 3].double().tolist())
            turn = Rotation.from_matrix(scene.poses[view, :3, :3].double().numpy()).as_quat()
            truth.append(f"{time + lag:.6f} {place} " + " ".join(map(str, turn)))
    for name, lines in (("rgb", rgb), ("depth", depth), ("groundtruth", truth)):
        (folder / f"{name}.txt").write_text("\n".join(lines))


def write_plain(scene: Reconstruction, folder: Path) -> None:
    """Images and frames.txt."""
    folder.mkdir(parents=True)
    _, h, w = scene.depths.shape
    rows = []
    for view, image in enumerate(scene.images):
        save_image(image, folder / f"{view}.png")
        focal, matrix = float(scene.focals[view]), scene.poses[view].double().flatten().tolist()
        rows.append(" ".join(map(str, [f"{view}.png", focal, focal, w / 2, h / 2, *matrix])))
    (folder / "frames.txt").write_text("\n".join(rows))
