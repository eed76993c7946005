"""`polyadapt timeseries sites`: where adapters would go on a forecaster."""

from __future__ import annotations

from ..core.cli import OneLineParser
from ..core.sites import select
from .backbone_words import HELP, backbone_called
from .network import Network
from .patches import Patches


def main(argv: list[str]) -> int:
    """Print the table of sites of the network around a backbone; without patterns, the method's."""
    parser = OneLineParser(
        prog="polyadapt timeseries sites",
        description="Show where adapters would go: path, shape, kind, and why.",
    )
    add = parser.add_argument
    add("backbone", metavar="BACKBONE", help=HELP)
    add("patterns", nargs="*", metavar="PATTERN", help="in place of table and output layer")
    add("--blocks", type=int, help="of the language model; default: 6")
    add("--look-back", type=int, default=336, help="steps of a window; default: 336")
    add("--horizon", type=int, default=96, help="steps to forecast; default: 96")
    add("--stride", type=int, default=8, help="steps between patches of 16; default: 8")
    asked = parser.parse_args(argv)
    backbone = backbone_called(asked.backbone, asked.blocks)
    network = Network(
        backbone.build(), asked.look_back, Patches(16, asked.stride), outputs=asked.horizon
    )
    print(select(network, asked.patterns or network.sites))
    return 0
