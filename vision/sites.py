"""`polyadapt vision sites`: where a pattern would put adapters on a model."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.cli import OneLineParser
from ..core.sites import Sites, select
from .backbones import TimmBackbone


def main(argv: list[str]) -> int:
    """Print the table of sites; nothing is downloaded, the model has random weights."""
    parser = OneLineParser(
        prog="polyadapt vision sites",
        description="Show where patterns would put adapters: path, part, shape, kind, and why.",
    )
    names = "a timm name: vit_small_patch16_224; or LiteMedSAM, TransformersSAM, TransformersSAM2"
    parser.add_argument("backbone", metavar="BACKBONE", help=names)
    patterns = "such as 'blocks.*.attn.qkv[q,v]', or of a SAM attention, mlp, neck"
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help=patterns)
    asked = parser.parse_args(argv)
    print(_selected(asked.backbone, asked.patterns))
    return 0


def _selected(name: str, patterns: Sequence[str]) -> Sites:
    from .medical.backbones import LiteMedSAM, TransformersSAM, TransformersSAM2

    drawn = TransformersSAM(pretrained=False), TransformersSAM2(pretrained=False)
    sams = {type(sam).__name__: sam for sam in (LiteMedSAM(), *drawn)}
    if name not in sams:
        return select(TimmBackbone(name=name, pretrained=False).build(), patterns)
    places = sams[name].places
    return select(sams[name].build(), [places.get(pattern, pattern) for pattern in patterns])
