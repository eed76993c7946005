"""A backbone in one word, for the command line."""

from __future__ import annotations

from ..core.errors import AdaptError
from .backbones import GPT2, Backbone, LanguageModel, NoLanguageModel, OfflineMiniLM, OneAttention

HELP = "minilm (offline), gpt2, a name of transformers or a folder, none, or attention"

_BARE: dict[str, Backbone] = {"none": NoLanguageModel(), "attention": OneAttention()}


def backbone_called(word: str, blocks: int | None, usual: int = 6) -> Backbone:
    """What a word stands for, with so many blocks of a language model (None: the `usual` number).

    >>> backbone_called("minilm", 3), backbone_called("gpt2", None).blocks
    (OfflineMiniLM(blocks=3, pretrained=True, seed=0), 6)
    """
    if word in _BARE:
        if blocks is not None:
            raise AdaptError(f"--blocks {blocks} is of a language model, and {word!r} is none")
        return _BARE[word]
    number = usual if blocks is None else blocks
    if word == "minilm":
        return OfflineMiniLM(blocks=number)
    return GPT2(blocks=number) if word == "gpt2" else LanguageModel(name=word, blocks=number)
