"""`polyadapt vision ...`: its verbs."""

from __future__ import annotations

from ..core import domain_command

VERBS = {
    "fit": "adapt a frozen backbone to images, by a configuration",
    "validate": "measure an adapter file or a checkpoint on the validation images",
    "test": "measure an adapter file or a checkpoint on the test images",
    "predict": "classify image files with an adapter file",
    "segment": "masks of pictures, NIfTI and DICOM files with an adapter file of a SAM",
    "compare": "train several configurations on the same data and seeds, side by side",
    "sweep-rank": "fit one configuration at several ranks; where the gain levels off",
    "vtab": "fit and measure the tasks of VTAB-1k; a table with both means",
    "sites": "show where a pattern would put adapters on a timm backbone",
    "quickstart": "adapt the tiny ViT to real digits, in minutes",
    "pretrain-tiny": "make the tiny ViT's weights again",
}


def main(argv: list[str]) -> int:
    """Run `polyadapt vision VERB ...` and return its exit code."""
    about = "Adapt frozen vision transformers to classify, or to segment, other images."
    return domain_command.run(__package__, about, VERBS, argv)
