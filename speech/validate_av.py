"""`polyadapt speech validate-av`: measures an audio-visual set on filmed clips."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Run the verb with its words, those of `validate`, and return its exit code."""
    from ..core import fitting
    from .av_configuration import DOMAIN

    return fitting.run(DOMAIN, "validate", argv)
