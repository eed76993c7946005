"""`polyadapt vision ...`: finds the verb, and loads only then what the verb needs."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

from ..core.cli import OneLineParser, command_named

Command = Callable[[list[str]], int]

VERBS = {
    "fit": "adapt a frozen backbone to images, by a configuration",
    "validate": "measure an adapter file or a checkpoint on the validation images",
    "test": "measure an adapter file or a checkpoint on the test images",
    "predict": "classify image files with an adapter file",
    "compare": "train several configurations on the same data and seeds, side by side",
    "sweep-rank": "fit one configuration at several ranks; where the gain levels off",
    "vtab": "fit and measure the tasks of VTAB-1k; a table with both means",
    "sites": "show where a pattern would put adapters on a timm backbone",
    "quickstart": "adapt the tiny ViT to real digits, in minutes",
    "pretrain-tiny": "make the tiny ViT's weights again",
}


def main(argv: list[str]) -> int:
    """Run `polyadapt vision VERB ...` and return its exit code."""
    parser = OneLineParser(
        prog="polyadapt vision",
        description="Adapt frozen vision transformers to classify other images.",
        epilog="`polyadapt vision VERB --help` tells a verb's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lines = "\n".join(f"{verb:<14} {about}" for verb, about in VERBS.items())
    parser.add_argument("verb", metavar="VERB", help="one of those below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its options")
    parser.epilog = f"{lines}\n\n{parser.epilog}"
    asked = parser.parse_args(argv)
    command = command_named(asked.verb, {verb: _command(verb) for verb in VERBS}, "verb")
    return command(asked.rest)


def _command(verb: str) -> Command:
    def command(rest: list[str]) -> int:
        if verb in ("fit", "validate", "test"):
            from ..core.fitting import run
            from .configuration import VISION

            return run(VISION, verb, rest)
        module = importlib.import_module(f".{verb.replace('-', '_')}", __package__)
        code: int = module.main(rest)
        return code

    return command
