"""`polyadapt vision sites`: where a pattern would put adapters on a timm model."""

from __future__ import annotations

from ..core.cli import OneLineParser
from ..core.sites import select
from .backbones import TimmBackbone


def main(argv: list[str]) -> int:
    """Print the table of sites; nothing is downloaded, the model has random weights."""
    parser = OneLineParser(
        prog="polyadapt vision sites",
        description="Show where patterns would put adapters: path, part, shape, kind, and why.",
    )
    parser.add_argument("backbone", metavar="BACKBONE", help="a timm name: vit_small_patch16_224")
    parser.add_argument(
        "patterns", nargs="+", metavar="PATTERN", help="such as 'blocks.*.attn.qkv[q,v]'"
    )
    asked = parser.parse_args(argv)
    model = TimmBackbone(name=asked.backbone, pretrained=False).build()
    print(select(model, asked.patterns))
    return 0
