"""A backbone in one word, for the command line."""

from __future__ import annotations

from .backbones import Backbone, OfflinePair, OpenCLIP, TransformersCLIP

HELP = (
    "open_clip's NAME/WEIGHTS (ViT-B-16-quickgelu/openai; WEIGHTS is a tag or a file, and"
    " hf-hub:NAME or local-dir:FOLDER brings its own), hf:NAME for a CLIP or SigLIP of transformers"
    " (hf:openai/clip-vit-base-patch16, or a folder), or offline: DINOv2 and MiniLM from a package"
    " index"
)


def backbone_called(word: str) -> Backbone:
    """The settings that a word stands for; without WEIGHTS they are random.

    >>> backbone_called("ViT-B-16-quickgelu/openai").to_json()["pretrained"]
    'openai'
    >>> backbone_called("offline")
    OfflinePair(img_size=98)
    """
    if word == "offline":
        return OfflinePair()
    if word.startswith(("hf-hub:", "local-dir:")):  # open_clip's names that bring weights
        return OpenCLIP(name=word, pretrained=None)
    if word.startswith("hf:"):
        return TransformersCLIP(name=word.removeprefix("hf:"))
    name, _, weights = word.partition("/")
    return OpenCLIP(name=name, pretrained=weights or None)
