"""`polyadapt geometry3d calibrate`: a set for a scene, from its images alone."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..core.adapters.lora import LoRA
from ..core.cli import OneLineParser
from ..core.container import require_place
from ..core.errors import AdaptError
from .asking import (
    add_network,
    add_pairs,
    add_training,
    ask,
    backbone_of,
    graph_of,
    rule_of,
    schedule_of,
    size_for,
    views_of,
)
from .calibration import LEAST_VIEWS, calibrate, surveyed
from .labels import pseudo_labels, usual_cut
from .predictions import one_line_if_out_of_memory
from .scene_file import Scene, save_scene
from .scene_index import features_of
from .telling import Telling


@one_line_if_out_of_memory(
    "calibrating", "take fewer or smaller images (--limit, --size), or a smaller --batch"
)
def main(argv: list[str]) -> int:
    """Calibrate on the images that `argv` names; the file is written if that helps."""
    asked = _parser().parse_args(argv)
    _refuse_a_taken_place(asked.out)
    name, schedule = _name(asked), schedule_of(asked)
    backbone = backbone_of(asked.backbone, asked.focal)
    rule = rule_of(asked, backbone)
    graph, size = graph_of(asked.graph, asked.reach), size_for(backbone, asked.size)
    least = LEAST_VIEWS + (asked.hold_out or 1)
    views = views_of(
        asked.images, backbone, size, asked.focal, asked.device, asked.limit, least=least
    )
    network, tell = views.network(), Telling()
    said = ask(network, views, graph, tell)
    seen = surveyed(views.images, said, rule, views.focals, asked.sweeps, tell)
    tell.clear()
    print(f"{len(views.pictures)} images, {len(seen.predictions.edges)} pairs: {seen.diagnosis}")
    cut = usual_cut(seen.alignment) if asked.cut is None else asked.cut
    labels = pseudo_labels(seen.alignment, cut)
    share, mu = f"{labels.share():.0%} of the pixels", seen.alignment.mu
    print(f"labels for {share}: weights above {cut:.3g}, mu {mu:.4g}", flush=True)
    found = calibrate(
        network,
        seen,
        type(backbone).default_sites,
        schedule=schedule,
        recipe=LoRA(rank=asked.rank, alpha=asked.rank),
        labels=labels,
        judge=labels,
        hold_out=asked.hold_out,
        name=name,
        seed=asked.seed,
        tell=tell,
    )
    tell.clear()
    print(found)
    if found.adapters is None:
        print(f"no file is written: calibration does not help here; use {asked.backbone} as it is")
        return 0
    scene = Scene(
        name=name,
        backbone=views.backbone,
        size=seen.predictions.size,
        focal=asked.focal,
        space=rule.space,
        mu=mu,
        gate=rule.gate,
        cut=cut,
        before=found.before,
        after=found.after,
    )
    save_scene(found.adapters, asked.out, scene, features_of(network, views.images))
    print(f"written: {asked.out}")
    return 0


def _refuse_a_taken_place(out: Path) -> None:
    """An older file would be taken for this run's where this one's base is kept."""
    require_place(out)
    if out.exists():
        raise AdaptError(f"{out} is there already: remove it, or name another --out")


def _name(asked: argparse.Namespace) -> str:
    """The scene's, as sets may be called."""
    name: str = asked.name or re.sub(r"[^A-Za-z0-9_-]+", "-", asked.out.stem).strip("-")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise AdaptError(f"a scene's name has letters, digits, _ and - only, not {name!r}: --name")
    return name


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt geometry3d calibrate",
        description="Calibrate a pointmap network on one scene by its own aligned predictions"
        " (LoRA3D). Where that does not help on held-out views, no file is written.",
        epilog="About ten images of the scene are wanted. Ctrl-C leaves nothing half-written.",
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="files, or folders of them")
    add("--out", type=Path, required=True, metavar="FILE", help="the scene's adapter file")
    add("--name", metavar="NAME", help="of the scene; default: the file's")
    add_network(parser, required=True)
    add_pairs(parser)
    add_training(parser)
    return parser
