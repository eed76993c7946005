"""`polyadapt geometry3d ...`: its verbs."""

from __future__ import annotations

from ..core import domain_command

VERBS = {
    "calibrate": "fit a set to a scene by its own images, and keep it where that helps",
    "reconstruct": "cameras, depths and points of a scene's images: PLY, glTF, COLMAP, a page",
    "evaluate": "score alignment and calibration on recorded scenes with known poses",
    "pretrain-small": "make the small pointmap network's weights again",
}


def main(argv: list[str]) -> int:
    """Run `polyadapt geometry3d VERB ...` and return its exit code."""
    about = "Calibrate pointmap networks on a scene, by its own images."
    return domain_command.run(__package__, about, VERBS, argv)
