"""What stands between the patches and the output layer: frozen blocks with a position table."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import AdaptError
from ..core.fingerprint import fingerprint

_TABLES = ("wpe", "position_embeddings", "embed_positions")  # transformers' names for them
POSITIONS = 1024  # as many as GPT-2 has
_SPREAD = 0.02  # GPT-2's and BERT's standard deviation of a fresh table


class Blocks(nn.Module, ABC):
    """Embedded patches [b, N, D] -> states [b, N, D].

    ============  ============================================================
    width         D
    positions_at  the path of the position table, an nn.Embedding, from here
    limit         the largest N
    ============  ============================================================
    """

    width: int
    positions_at: str = "positions"
    limit: int

    @abstractmethod
    def forward(self, embedded: Tensor) -> Tensor:
        """[b, N, D] -> [b, N, D]."""

    def set_dropout(self, p: float) -> None:
        """Make p the probability of every dropout; in evaluation mode none acts."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p


class LanguageBlocks(Blocks):
    """A decoder or encoder of transformers, called with embeddings in the place of words.

    Its word embeddings and its pooler, which nothing reads, are dropped. A model without a learned
    position table (rotary positions, say) is given one of zeros, so that there is one to adapt.

    Raises `AdaptError` for a model that does not take embeddings of its own width.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.width = _width(model)
        model.config.use_cache = False
        model.set_input_embeddings(nn.Identity())
        if hasattr(model, "pooler"):
            model.pooler = None
        self.model: nn.Module = model
        self.positions = None
        found = _position_table(model)
        if found is None:
            self.positions = nn.Embedding(POSITIONS, self.width)
            nn.init.zeros_(self.positions.weight)
            self.limit = min(POSITIONS, model.config.max_position_embeddings)
        else:
            path, table = found
            self.positions_at = f"model.{path}"
            first = 0 if table.padding_idx is None else table.padding_idx + 1
            self.limit = table.num_embeddings - first

    def forward(self, embedded: Tensor) -> Tensor:
        if self.positions is not None:
            embedded = embedded + self.positions(_numbers(embedded))
        states: Tensor = self.model(inputs_embeds=embedded).last_hidden_state
        return states


class PositionsOnly(Blocks):
    """No language model at all: each patch and its position."""

    def __init__(self, width: int, positions: int) -> None:
        super().__init__()
        self.width = width
        self.limit = positions
        self.positions = nn.Embedding(positions, width)
        nn.init.normal_(self.positions.weight, std=_SPREAD)

    def forward(self, embedded: Tensor) -> Tensor:
        placed: Tensor = embedded + self.positions(_numbers(embedded))
        return placed


class AttentionBlock(PositionsOnly):
    """One layer of attention over all patches, with a residual and no MLP."""

    def __init__(self, width: int, heads: int, positions: int) -> None:
        if heads < 1 or width % heads:
            raise AdaptError(f"heads={heads} is not allowed: a divisor of width={width}")
        super().__init__(width, positions)
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, embedded: Tensor) -> Tensor:
        h = super().forward(embedded)
        each = self.qkv(self.norm(h)).unflatten(-1, (3, self.heads, -1))
        q, k, v = each.permute(2, 0, 3, 1, 4)  # [b, heads, N, D / heads] each
        mixed = F.scaled_dot_product_attention(q, k, v)
        attended: Tensor = h + self.proj(mixed.transpose(1, 2).flatten(2))
        return attended


def digest(blocks: Blocks) -> str:
    """SHA-256 of the names and fingerprints of all weights: other blocks are told apart by it."""
    found = hashlib.sha256()
    for name, weight in sorted(fingerprint(blocks, []).items()):
        found.update(f"{name} {weight}\n".encode())
    return found.hexdigest()


def _numbers(embedded: Tensor) -> Tensor:
    """0 to N - 1."""
    return torch.arange(embedded.shape[1], device=embedded.device)


def _width(model: Any) -> int:
    """D of a model that takes embeddings and returns states of one width."""
    name = type(model).__name__
    takes = "inputs_embeds" in inspect.signature(model.forward).parameters
    if not takes or model.config.is_encoder_decoder:
        raise AdaptError(
            f"{name} is not allowed: a decoder or an encoder that takes inputs_embeds is"
        )
    width = int(model.get_input_embeddings().weight.shape[1])
    if width != model.config.hidden_size:
        raise AdaptError(
            f"{name} takes embeddings of width {width} and returns {model.config.hidden_size}:"
            " one width is needed"
        )
    return width


def _position_table(model: nn.Module) -> tuple[str, nn.Embedding] | None:
    """The learned table that is read by position number; a subclass may be called otherwise."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in _TABLES and type(module) is nn.Embedding:
            return path, module
    return None
