"""`polyadapt speech ...`: its verbs."""

from __future__ import annotations

from ..core import domain_command

VERBS = {
    "fit": "adapt a frozen Whisper to speech, by a configuration",
    "validate": "measure an adapter file or a checkpoint on the validation clips",
    "test": "measure an adapter file or a checkpoint on the test clips",
    "fit-av": "train an audio-visual set on filmed clips, by a configuration",
    "validate-av": "measure an audio-visual set or a checkpoint on filmed clips",
    "transcribe": "write down what is said in audio files",
    "make-bundle": "put sets into a folder, with a selector that chooses among them by the noise",
    "select": "which set of a bundle fits the noise of a clip",
    "sites": "show where a pattern would put adapters on a Whisper",
}


def main(argv: list[str]) -> int:
    """Run `polyadapt speech VERB ...` and return its exit code."""
    about = "Adapt frozen Whispers to other speech, and transcribe with them."
    return domain_command.run(__package__, about, VERBS, argv)
