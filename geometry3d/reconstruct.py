"""`polyadapt geometry3d reconstruct`: cameras, depths and a point cloud of a scene's images."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..core.cli import OneLineParser
from ..core.errors import AdaptError
from ..core.store import load
from .alignment import align
from .asking import (
    Views,
    add_network,
    add_pairs,
    ask,
    backbone_of,
    graph_of,
    number,
    size_for,
    views_of,
    whole,
)
from .export_colmap import require_names, write_colmap
from .export_gltf import write_glb
from .export_ply import write_ply
from .pictures_in import Part
from .pointmaps import PointmapNetwork
from .predictions import one_line_if_out_of_memory
from .reconstruction import Reconstruction
from .scene_file import Scene, read_scene
from .scene_index import SceneIndex
from .telling import Telling
from .viewer import write_viewer
from .weights import Calibrated


@one_line_if_out_of_memory("reconstructing", "take fewer or smaller images (--limit, --size)")
def main(argv: list[str]) -> int:
    """Reconstruct the images that `argv` names into a folder, whole or not at all."""
    asked = _parser().parse_args(argv)
    _check(asked)
    views, network, rule = _ready(asked)
    require_names(views.pictures.names)
    tell = Telling()
    found = ask(network, views, graph_of(asked.graph, asked.reach), tell)
    alignment = align(
        found,
        rule,
        steps=asked.sweeps,
        focals=views.focals,
        progress=lambda done, of, _: tell("sweeps of alignment", done, of),
    )
    tell.clear()
    scene = alignment.reconstruction(views.images, views.pictures.names).to("cpu")
    with whole_folder(asked.out) as folder:
        points = write_all(scene, folder, views.pictures.parts, asked.above, asked.points)
    print(f"{len(scene)} views, {points:,} points: {asked.out / 'view.html'} shows them")
    return 0


def write_all(
    scene: Reconstruction,
    folder: Path,
    parts: Sequence[Part] | None = None,
    above: float = 0.0,
    most: int = 500_000,
) -> int:
    """Every form of a reconstruction; how many points the cloud has.

    cameras.json (poses, camera to world by rows, focals in pixels of views and images), depths/
    (a .npy per view in their order, fp32 [h, w]), cloud.ply, cloud.glb, colmap/, view.html.
    """
    cameras = [_camera(scene, view, parts) for view in range(len(scene))]
    (folder / "cameras.json").write_text(json.dumps(cameras, indent=1))
    (folder / "depths").mkdir()
    for view, depth in enumerate(scene.depths):
        np.save(folder / "depths" / f"{view:04}.npy", depth.cpu().numpy())
    (folder / "colmap").mkdir()
    write_colmap(scene, folder / "colmap", parts, above)
    write_glb(scene, folder / "cloud.glb", above, most)
    write_viewer(scene, folder / "view.html", above=above)
    return write_ply(scene, folder / "cloud.ply", above, most)


def _camera(scene: Reconstruction, view: int, parts: Sequence[Part] | None) -> dict[str, Any]:
    focal = float(scene.focals[view])
    return {
        "name": scene.names[view],
        "pose": scene.poses[view].tolist(),
        "focal": focal,
        "focal_in_image": focal if parts is None else parts[view].focal_there(focal),
    }


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` at the end; after an error nothing is left."""
    try:
        made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise AdaptError(f"cannot write {out}: {error.strerror}") from error
    try:
        yield made
        made.chmod(0o755)
        os.replace(made, out)
    except OSError as error:
        raise AdaptError(f"cannot write {out}: {error.strerror}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _check(asked: argparse.Namespace) -> None:
    sources = [asked.backbone, asked.set, asked.sets]
    if sum(source is not None for source in sources) != 1:
        raise AdaptError("name one of --backbone, --set and --sets: a file knows its backbone")
    if asked.scene is not None and asked.sets is None:
        raise AdaptError("--scene names a scene of --sets")
    if not asked.out.parent.is_dir():
        raise AdaptError(f"cannot write {asked.out}: there is no folder {asked.out.parent}")
    if asked.out.exists() and not (asked.out.is_dir() and not any(asked.out.iterdir())):
        raise AdaptError(f"{asked.out} is there already: remove it, or name another --out")


def _ready(asked: argparse.Namespace) -> tuple[Views, PointmapNetwork, Calibrated]:
    """The views, the network with the set that acts, and the weights' rule."""
    if asked.backbone is not None:
        backbone = backbone_of(asked.backbone, asked.focal)
        size = size_for(backbone, asked.size)
        views = views_of(asked.images, backbone, size, asked.focal, asked.device, limit=asked.limit)
        return views, views.network(), Calibrated(gate=backbone.gate)
    if asked.set is not None:
        scene, _ = read_scene(asked.set)
        views = _as_calibrated(asked, scene)
        network = views.network()
        load(network, asked.set)
        return views, network, scene.rule()
    index = SceneIndex(asked.sets)
    views = _as_calibrated(asked, next(iter(index.scenes.values())))
    index.network = views.network()
    name = index.find(views.images) if asked.scene is None else asked.scene
    scene = index.scene_at(name)
    index.use(name)
    print(f"scene: {name}")
    return views, index.network, scene.rule()


def _as_calibrated(asked: argparse.Namespace, scene: Scene) -> Views:
    """The images as the scene's were seen."""
    if asked.size is not None and asked.size != scene.size:
        height, width = scene.size
        raise AdaptError(f"the set of {scene.name!r} was made at {width}x{height}: omit --size")
    focal = scene.focal if asked.focal is None else asked.focal
    return views_of(
        asked.images, scene.backbone, scene.size, focal, asked.device, limit=asked.limit
    )


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt geometry3d reconstruct",
        description="Find cameras, depths and points of a scene's images, and write them as PLY,"
        " glTF, COLMAP's text, arrays and a page to look at. Lengths have no unit.",
        epilog="The folder is written whole or not at all.",
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="files, or folders of them")
    add("--out", type=Path, required=True, metavar="FOLDER")
    add("--set", type=Path, metavar="FILE", help="a scene's adapter file")
    add("--sets", type=Path, metavar="FOLDER", help="scenes' files: the images choose one")
    add("--scene", metavar="NAME", help="of --sets, instead of letting the images choose")
    add_network(parser, required=False)
    add_pairs(parser)
    add("--above", type=number, default=0.0, metavar="W", help="show points of a weight above W")
    add("--points", type=whole, default=500_000, metavar="N", help="at most; default: 500000")
    return parser
