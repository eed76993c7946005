"""`polyadapt vlm ...`: its verbs."""

from __future__ import annotations

from ..core import domain_command

VERBS = {
    "fit": "adapt a frozen image-text model to a few images per class, by a configuration",
    "validate": "measure an adapter file or a checkpoint on the validation images",
    "test": "measure an adapter file or a checkpoint on the test images",
    "predict": "classify image files with an adapter file",
    "zero-shot": "classify image files into classes that you name, without training",
    "few-shot": "compare methods by shots and seeds on one data set; a table and a picture",
    "transfer": "test what methods have learned on other classes or other data; a table",
    "pretrain-pair": "train the offline pair's projections again",
    "sites": "show where adapters would go on a backbone",
}


def main(argv: list[str]) -> int:
    """Run `polyadapt vlm VERB ...` and return its exit code."""
    about = "Adapt frozen image-text models (CLIP and its kin) with a few images per class."
    return domain_command.run(__package__, about, VERBS, argv)
