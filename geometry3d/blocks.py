"""Transformer blocks of the pointmap networks, with rotary positions.

The names of their parts are those in DUSt3R's published files, so that a file's keys are ours.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .rope import Rotary, turned

EPSILON = 1e-6  # of every layer norm in the published networks; torch's own is 1e-5


class Attention(nn.Module):
    """Self-attention with one fused projection: [b, n, d] -> [b, n, d]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, places: Rotary) -> Tensor:
        query, key, value = (_split(part, self.heads) for part in self.qkv(tokens).chunk(3, -1))
        joined = F.scaled_dot_product_attention(turned(query, places), turned(key, places), value)
        mixed: Tensor = self.proj(_join(joined))
        return mixed


class CrossAttention(nn.Module):
    """Attention of tokens [b, n, d] to others [b, m, d], with a projection each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projq = nn.Linear(width, width)
        self.projk = nn.Linear(width, width)
        self.projv = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, others: Tensor, places: Rotary, their: Rotary) -> Tensor:
        query = turned(_split(self.projq(tokens), self.heads), places)
        key = turned(_split(self.projk(others), self.heads), their)
        value = _split(self.projv(others), self.heads)
        mixed: Tensor = self.proj(_join(F.scaled_dot_product_attention(query, key, value)))
        return mixed


class MLP(nn.Module):
    """Two linear layers with a GELU between: [b, n, d] -> [b, n, d]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        seen: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return seen


class Block(nn.Module):
    """Self-attention, then an MLP, each on normed tokens and added: x + f(norm(x))."""

    def __init__(self, width: int, heads: int, ratio: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = MLP(width, ratio * width)

    def forward(self, tokens: Tensor, places: Rotary) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens), places)
        seen: Tensor = tokens + self.mlp(self.norm2(tokens))
        return seen


class DecoderBlock(nn.Module):
    """Self-attention, attention to the other image's tokens, then an MLP."""

    def __init__(self, width: int, heads: int, ratio: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.norm_y = nn.LayerNorm(width, eps=EPSILON)
        self.cross_attn = CrossAttention(width, heads)
        self.norm3 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = MLP(width, ratio * width)

    def forward(self, tokens: Tensor, others: Tensor, places: Rotary, their: Rotary) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens), places)
        seen = self.norm_y(others)
        tokens = tokens + self.cross_attn(self.norm2(tokens), seen, places, their)
        known: Tensor = tokens + self.mlp(self.norm3(tokens))
        return known


def _split(tokens: Tensor, heads: int) -> Tensor:
    """[b, n, d] -> [b, heads, n, d / heads]."""
    split: Tensor = tokens.unflatten(-1, (heads, -1)).transpose(1, 2)
    return split


def _join(heads: Tensor) -> Tensor:
    """[b, heads, n, d / heads] -> [b, n, d]."""
    return heads.transpose(1, 2).flatten(2)
