"""`polyadapt geometry3d evaluate`: scores on recordings whose poses are known."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..core.adapters.lora import LoRA
from ..core.cli import OneLineParser
from ..core.container import require_place, write_atomically
from ..core.errors import AdaptError
from ..core.store import load
from .asking import (
    add_network,
    add_pairs,
    add_training,
    backbone_of,
    graph_of,
    rule_of,
    schedule_of,
    size_for,
)
from .backbones import Backbone, SmallPointmaps
from .evaluation import METHODS, Row, Wanted, as_csv, compared, table
from .layouts import read_recording
from .predictions import one_line_if_out_of_memory
from .reconstruction import Reconstruction
from .recordings import divided
from .scene_file import read_scene
from .telling import Telling

VIEWS = 12  # of a recording: ten to calibrate on, as the paper has, and two held out


@one_line_if_out_of_memory(
    "evaluating", "take fewer or smaller images (--limit, --size), or a smaller --batch"
)
def main(argv: list[str]) -> int:
    """Print a table, a row for each recording and method; perhaps also as CSV."""
    asked = _parser().parse_args(argv)
    backbone, size = _backbone(asked)
    wanted = Wanted(
        methods=asked.methods,
        graph=graph_of(asked.graph, asked.reach),
        rule=rule_of(asked, backbone),
        sweeps=asked.sweeps,
        schedule=schedule_of(asked),
        recipe=LoRA(rank=asked.rank, alpha=asked.rank),
        hold_out=asked.hold_out,
        cut=asked.cut,
        seed=asked.seed,
    )
    recordings = [read_recording(folder) for folder in asked.recordings]
    views = asked.limit or VIEWS
    rows: list[Row] = []
    for recording in recordings:
        numbers, _ = divided(len(recording), min(views, len(recording)), 0)
        truth = recording.load(numbers, size)[0].to(asked.device)
        known, focals = _focals(backbone, truth, recording.name, asked.known_focals)
        network = known.build().to(asked.device).eval()
        if asked.set is not None:
            load(network, asked.set)
        sites, tell = type(known).default_sites, Telling()
        for row in compared(
            network, truth, sites, recording.name, wanted, focals=focals, tell=tell
        ):
            rows.append(row)
            tell.clear()
            print(f"{row.scene}, {row.method}: ate {row.ate:.4g}", flush=True)
    print(table(rows))
    if asked.out is not None:
        write_atomically(asked.out, as_csv(rows))
        print(f"written: {asked.out}")
    return 0


def _backbone(asked: argparse.Namespace) -> tuple[Backbone, tuple[int, int]]:
    """The backbone and the views' size; what cannot go together is refused before anything runs."""
    if asked.out is not None:
        require_place(asked.out)
    if (asked.backbone is None) == (asked.set is None):
        raise AdaptError("name one of --backbone and --set: a file knows its backbone")
    if asked.set is not None and {"self", "truth"} & {*asked.methods}:
        raise AdaptError("--set is calibrated already: --methods fixed and robust go with it")
    if asked.set is not None:
        scene, _ = read_scene(asked.set)
        return scene.backbone, scene.size
    backbone = backbone_of(asked.backbone, focal=1.0)  # the recording knows the true one
    return backbone, size_for(backbone, asked.size)


def _focals(
    backbone: Backbone, truth: Reconstruction, name: str, known: bool
) -> tuple[Backbone, Tensor | None]:
    """The recording's focals where they are asked for, or the network needs them."""
    small = isinstance(backbone, SmallPointmaps)
    if not (known or small):
        return backbone, None
    if not truth.focals.isfinite().all():
        raise AdaptError(f"the recording {name} does not tell the focal length of its camera")
    if not isinstance(backbone, SmallPointmaps):
        return backbone, truth.focals
    if not torch.allclose(truth.focals, truth.focals[0], rtol=1e-3):
        raise AdaptError(f"{name} has several focal lengths: the small network takes one")
    return replace(backbone, focal=float(truth.focals[0])), truth.focals


def _methods(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if not set(chosen) <= set(METHODS):
        raise argparse.ArgumentTypeError(f"{text!r}: some of {','.join(METHODS)}, with commas")
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt geometry3d evaluate",
        description="Score alignment and calibration on recordings with known poses, laid out as"
        " Replica, TUM RGB-D or, plainly, Waymo (frames.txt).",
        epilog="Views lie evenly in a recording; those held out train nothing.",
    )
    add = parser.add_argument
    add("recordings", nargs="+", type=Path, metavar="FOLDER", help="one recording each")
    about = "fixed: DUSt3R's alignment; robust: LoRA3D's; self: self-calibrated; truth: trained on"
    about += " the true depths; default: fixed,robust"
    add("--methods", type=_methods, default=("fixed", "robust"), metavar="A,B", help=about)
    add("--set", type=Path, metavar="FILE", help="a scene's adapter file instead of --backbone")
    add("--known-focals", action="store_true", help="align with the recording's focal lengths")
    add("--out", type=Path, metavar="FILE", help="the table as CSV")
    add_network(parser, required=False, focal=False)
    add_pairs(parser)
    add_training(parser)
    return parser
