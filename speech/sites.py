"""`polyadapt speech sites`: where a pattern would put adapters on a Whisper."""

from __future__ import annotations

import re

import torch
from torch import nn

from ..core.cli import OneLineParser
from ..core.sites import select
from .names import LAYOUTS, Layout, sites_for

# Width, heads, layers of the encoder and of the decoder (arXiv 2212.04356, table 1; turbo's card).
SIZES = {
    "tiny": (384, 6, 4, 4),
    "base": (512, 8, 6, 6),
    "small": (768, 12, 12, 12),
    "medium": (1024, 16, 24, 24),
    "large": (1280, 20, 32, 32),
    "turbo": (1280, 20, 32, 4),
}


def main(argv: list[str]) -> int:
    """Print the table of sites; nothing is downloaded, the model has shapes and no weights."""
    parser = OneLineParser(
        prog="polyadapt speech sites",
        description="Show where patterns would put adapters: path, part, shape, kind, and why.",
    )
    parser.add_argument("size", metavar="SIZE", choices=SIZES, help=f"one of {', '.join(SIZES)}")
    parser.add_argument(
        "patterns",
        nargs="+",
        metavar="PATTERN",
        help="such as 'decoder.blocks.*.cross_attn.query', or a word such as attention or mlp",
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="openai", help="default: openai")
    asked = parser.parse_args(argv)
    patterns = [p for word in asked.patterns for p in _patterns(word, asked.layout)]
    print(select(_shapes(asked.size, asked.layout), patterns))
    return 0


def _patterns(word: str, layout: Layout) -> list[str]:
    return list(sites_for(layout, word)) if re.fullmatch(r"[a-z-]+", word) else [word]


def _shapes(size: str, layout: Layout) -> nn.Module:
    """A Whisper of that size without memory; openai-whisper's whole class cannot be made so."""
    from whisper.model import AudioEncoder, ModelDimensions, TextDecoder

    width, heads, ears, mouths = SIZES[size]
    dims = ModelDimensions(80, 1500, width, heads, ears, 51865, 448, width, heads, mouths)
    with torch.device("meta"):
        if layout == "openai":
            towers = nn.Module()
            towers.encoder = AudioEncoder(80, 1500, width, heads, ears)
            towers.decoder = TextDecoder(dims.n_vocab, 448, width, heads, mouths)
            return towers
        from transformers import WhisperForConditionalGeneration

        from .convert import configuration

        return WhisperForConditionalGeneration(configuration(dims))
