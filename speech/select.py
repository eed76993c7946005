"""`polyadapt speech select`: what noise is in a clip, and which set of a bundle to use for it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from ..core.cli import OneLineParser
from ..core.errors import AdaptError
from .decision import Choice


def main(argv: list[str]) -> int:
    """Print scenario, probabilities, SNR, expected WERs and the choice for every clip."""
    asked = _parser().parse_args(argv)
    from .bundle import Bundle

    bundle = Bundle.open(asked.sets)
    for name, cause in bundle.damaged.items():
        print(f"polyadapt: set {name!r} is left out: {cause}", file=sys.stderr)
    if bundle.deaf or bundle.decision is None:
        raise AdaptError(f"{bundle.folder}: sets cannot be chosen automatically: {bundle.deaf}")
    failed = 0
    for clip in asked.clips:
        try:
            choice = bundle.choose(clip)
        except AdaptError as error:
            failed += 1
            print(f"polyadapt: skipped: {error}", file=sys.stderr)
            continue
        print(told(str(clip), choice), flush=True)
    print(bundle.decision.advice())
    return 2 if failed else 0


def told(clip: str, choice: Choice) -> str:
    """A choice in words.

    >>> print(told("a.wav", Choice("b", "least expected WER", {"x": 0.9, "y": 0.1}, {"b": 4.2})))
    a.wav: x
      probability: x 0.90, y 0.10
      expected WER in %: b 4.2
      choice: b (least expected WER)
    """
    snr = "" if choice.snr_db is None else f", SNR {choice.snr_db:.1f} dB"
    lines = [f"{clip}: {choice.scenario or 'unknown'}{snr}"]
    if choice.probabilities:
        lines.append(f"  probability: {_listed(choice.probabilities, 2, -1)}")
        lines.append(f"  expected WER in %: {_listed(choice.expected, 1, 1)}")
    lines.append(f"  choice: {choice.name or 'none, the frozen base'} ({choice.why})")
    return "\n".join(lines)


def _listed(values: Mapping[str, float], digits: int, sign: int) -> str:
    ordered = sorted(values.items(), key=lambda item: sign * item[1])
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in ordered)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt speech select",
        description="Say which adapter set of a bundle has the least expected WER for a clip.",
    )
    parser.add_argument("clips", nargs="+", type=Path, metavar="CLIP", help="audio files")
    parser.add_argument("--sets", type=Path, required=True, metavar="FOLDER", help="the bundle")
    return parser
