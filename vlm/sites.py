"""`polyadapt vlm sites`: where adapters would go on an image-text model."""

from __future__ import annotations

from typing import get_args

from ..core.cli import OneLineParser
from ..core.sites import select
from .backbone_words import HELP, backbone_called
from .names import Encoder, Layers, sites_for


def main(argv: list[str]) -> int:
    """Print the table of sites; a name of open_clip without weights downloads nothing."""
    parser = OneLineParser(
        prog="polyadapt vlm sites",
        description="Show where adapters would go: path, part, shape, kind, and why.",
    )
    add = parser.add_argument
    add("backbone", metavar="BACKBONE", help=f"{HELP}; ViT-B-16 alone has random weights")
    add("patterns", nargs="*", metavar="PATTERN", help="in place of --encoder, --parts, --layers")
    add("--encoder", default="both", choices=get_args(Encoder), help="default: both")
    add("--parts", default="qkv", help="of q, k, v and o; default: qkv")
    add("--layers", default="all", choices=get_args(Layers), help="default: all")
    asked = parser.parse_args(argv)
    model = backbone_called(asked.backbone).build()
    chosen = sites_for(model, asked.encoder, tuple(asked.parts), asked.layers)
    print(select(model, asked.patterns or chosen))
    return 0
