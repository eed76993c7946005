"""The frozen blocks that a configuration can name: language models, and what they must beat."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core import backbone as core
from ..core.building import made, seeded
from ..core.errors import AdaptError
from ..core.recipe import require
from .blocks import POSITIONS, AttentionBlock, Blocks, LanguageBlocks, PositionsOnly


@dataclass(frozen=True, kw_only=True)
class Backbone(core.Backbone):
    """Blocks that take embedded patches [b, N, D] and return states [b, N, D], in eval mode.

    >>> Backbone.from_json(OfflineMiniLM(blocks=3).to_json())
    OfflineMiniLM(blocks=3, pretrained=True, seed=0)
    """

    @abstractmethod
    def build(self) -> Blocks:
        """The frozen blocks, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class GPT2(Backbone):
    """The first `blocks` blocks of GPT-2, with its final LayerNorm: One-for-All's own (2603.29756).

    `name`: of the hub or a folder. `pretrained=False` draws the weights of the same class from
    `seed`; `options` (n_embd, n_head, n_positions, ...) then change its size.

    >>> small = {"n_embd": 8, "n_head": 2, "n_positions": 32, "vocab_size": 1}
    >>> blocks = GPT2(blocks=2, pretrained=False, options=small).build()
    >>> blocks(torch.zeros(1, 5, 8)).shape, blocks.positions_at
    (torch.Size([1, 5, 8]), 'model.wpe')
    """

    name: str = "gpt2"
    blocks: int = 6
    pretrained: bool = True
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_blocks(self.blocks)
        require(
            not (self.pretrained and self.options),
            f"GPT2: options={self.options} is for random weights: set pretrained=false",
        )

    def build(self) -> Blocks:
        with made(_what("GPT2Model", self.name)), seeded(self.seed):
            from transformers import GPT2Config, GPT2Model

            plain = self.name == "gpt2" and not self.pretrained  # its sizes are the class's own
            config = GPT2Config() if plain else GPT2Config.from_pretrained(self.name)
            config.update(self.options)
            config.n_layer = _first(self.blocks, config)
            if self.pretrained:
                model = _without_progress(GPT2Model.from_pretrained, self.name, config=config)
            else:
                model = GPT2Model(config)
            return LanguageBlocks(model).eval()


@dataclass(frozen=True, kw_only=True)
class LanguageModel(Backbone):
    """The first `blocks` blocks of any decoder or encoder of transformers, by name or folder.

    `pretrained=False` draws the weights of the same class and size from `seed`.
    Raises `AdaptError` for what cannot be fetched, for encoder-decoders, and for models whose
    embeddings are of another width than their states.
    """

    name: str
    blocks: int = 6
    pretrained: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _require_blocks(self.blocks)

    def build(self) -> Blocks:
        with made(_what("AutoModel", self.name)), seeded(self.seed):
            from transformers import AutoConfig, AutoModel

            config = AutoConfig.from_pretrained(self.name)
            config.num_hidden_layers = _first(self.blocks, config)
            if self.pretrained:
                model = _without_progress(AutoModel.from_pretrained, self.name, config=config)
            else:
                model = AutoModel.from_config(config, dtype=torch.float32)
            return LanguageBlocks(model).eval()


@dataclass(frozen=True, kw_only=True)
class OfflineMiniLM(Backbone):
    """The first `blocks` of the six blocks of MiniLM (BERT, width 384) from a package index."""

    blocks: int = 6
    pretrained: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _require_blocks(self.blocks)

    def build(self) -> Blocks:
        from .offline import minilm

        with seeded(self.seed):
            return LanguageBlocks(minilm(self.blocks, self.pretrained)).eval()


@dataclass(frozen=True, kw_only=True)
class NoLanguageModel(Backbone):
    """A random position table and nothing behind it: the ablation of arXiv 2406.16964.

    The paper trains what it puts in the place of the language model; here it is frozen, too, and
    the adapters at the table and the output layer are all that learns.
    """

    width: int = 768
    positions: int = POSITIONS
    seed: int = 0

    def build(self) -> Blocks:
        with seeded(self.seed):
            return PositionsOnly(self.width, self.positions).eval()


@dataclass(frozen=True, kw_only=True)
class OneAttention(Backbone):
    """One random attention layer in the place of the language model, as in arXiv 2406.16964.

    Frozen as all else, see `NoLanguageModel`; its LayerNorm and residual are our choice.
    """

    width: int = 768
    heads: int = 12
    positions: int = POSITIONS
    seed: int = 0

    def build(self) -> Blocks:
        with seeded(self.seed):
            return AttentionBlock(self.width, self.heads, self.positions).eval()


def _what(kind: str, name: str) -> str:
    return f"transformers' {kind} {name!r} (without a network, use a folder, or OfflineMiniLM)"


def _require_blocks(blocks: object) -> None:
    whole = isinstance(blocks, int) and not isinstance(blocks, bool) and blocks >= 1
    require(whole, f"blocks={blocks!r} is not allowed: a whole number from 1")


def _first(blocks: int, config: Any) -> int:
    """`blocks`, if the model has as many."""
    there = config.num_hidden_layers
    if blocks > there:
        raise AdaptError(f"blocks={blocks} is not allowed: this language model has {there}")
    return blocks


def _without_progress(load: Callable[..., Any], name: str, **settings: Any) -> Any:
    """transformers' loading, in fp32, without a bar per file."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return load(name, dtype=torch.float32, **settings)
    finally:
        if shown:
            logging.enable_progress_bar()
