"""The methods that `polyadapt vlm few-shot` compares: baselines, adapters, configurations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.adapters.block_lora import BlockLoRA
from ..core.errors import AdaptError
from ..core.recipe import Recipe
from .adapters import CLIP_LORA

ZERO_SHOT = "zero-shot"
BASELINES = (ZERO_SHOT, "linear-probe", "tip-adapter", "tip-adapter-f")
"""They work on features of the frozen model; all but the first learn from the shots."""

_BLOCK_LORA = BlockLoRA(rank=2, blocks=2, dropout=CLIP_LORA.dropout)

ADAPTERS: Mapping[str, Recipe] = {
    "clip-lora": CLIP_LORA,
    "block-lora": _BLOCK_LORA,
    "block-lora-input": _BLOCK_LORA.replace(split="input"),
    "lora-1": CLIP_LORA.replace(rank=1),
    "lora-1-fast": _BLOCK_LORA.plain(),
    "lora-8": CLIP_LORA.replace(rank=8),
    "block-lora-8": _BLOCK_LORA.replace(rank=8, blocks=8),
}
"""CLIP-LoRA, Block-LoRA in both readings, and what either is to be compared with: `lora-1-fast` is
the LoRA of rank 1, its B learning twice as fast, that `block-lora` equals but for rounding and the
weight decay of B."""

DEFAULT = (*BASELINES, "clip-lora", "block-lora")


@dataclass(frozen=True)
class Method:
    """A name, and the words of `polyadapt vlm fit` that stand for it; a baseline has none."""

    name: str
    words: tuple[str, ...] = ()

    @property
    def learns(self) -> bool:
        """Whether it looks at the shots at all."""
        return self.name != ZERO_SHOT


def methods_called(words: str) -> list[Method]:
    """Those of a list "A,B,..."; `AdaptError` for two of one name."""
    methods = [method_called(word) for word in words.split(",")]
    names = [method.name for method in methods]
    if twice := [name for name in names if names.count(name) > 1]:
        raise AdaptError(f"two methods are called {twice[0]!r}")
    return methods


def method_called(word: str) -> Method:
    """A baseline, a built-in adapter, or a configuration of `polyadapt vlm fit` by its file.

    Of a configuration everything counts but backbone, template, data and seed, which are the
    comparison's.

    >>> method_called("lora-1").words[0][:40]
    '--model.adapter={"class_path": "LoRA", "'
    """
    if word in BASELINES:
        return Method(word)
    if word in ADAPTERS:
        recipe = ADAPTERS[word]
        said = {"class_path": type(recipe).__name__, "init_args": dataclasses.asdict(recipe)}
        return Method(word, (f"--model.adapter={json.dumps(said)}",))
    if Path(word).suffix not in (".yaml", ".yml"):
        known = ", ".join((*BASELINES, *ADAPTERS))
        raise AdaptError(f"unknown method {word!r}; there are {known}, and files FILE.yaml")
    if not Path(word).is_file():
        raise AdaptError(f"there is no configuration {word}")
    return Method(Path(word).stem, (f"--config={word}",))
