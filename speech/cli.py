"""`polyadapt speech ...`: finds the verb, and loads only then what the verb needs."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

from ..core.cli import OneLineParser, command_named

Command = Callable[[list[str]], int]

VERBS = {
    "fit": "adapt a frozen Whisper to speech, by a configuration",
    "validate": "measure an adapter file or a checkpoint on the validation clips",
    "test": "measure an adapter file or a checkpoint on the test clips",
    "transcribe": "write down what is said in audio files",
    "select": "which set of a bundle fits the noise of a clip",
    "sites": "show where a pattern would put adapters on a Whisper",
}


def main(argv: list[str]) -> int:
    """Run `polyadapt speech VERB ...` and return its exit code."""
    parser = OneLineParser(
        prog="polyadapt speech",
        description="Adapt frozen Whispers to other speech, and transcribe with them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lines = "\n".join(f"{verb:<12} {about}" for verb, about in VERBS.items())
    parser.add_argument("verb", metavar="VERB", help="one of those below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its options")
    parser.epilog = f"{lines}\n\n`polyadapt speech VERB --help` tells a verb's options."
    asked = parser.parse_args(argv)
    command = command_named(asked.verb, {verb: _command(verb) for verb in VERBS}, "verb")
    return command(asked.rest)


def _command(verb: str) -> Command:
    def command(rest: list[str]) -> int:
        if verb in ("fit", "validate", "test"):
            from ..core.fitting import run
            from .configuration import SPEECH

            return run(SPEECH, verb, rest)
        module = importlib.import_module(f".{verb}", __package__)
        code: int = module.main(rest)
        return code

    return command
