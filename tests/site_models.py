"""What the tests of sites share: a small transformer, and how a refusal is read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core.errors import SiteError
from polyadapt.core.sites import Sites


class Attention(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.drop = nn.Dropout(0.1)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        y: Tensor = self.proj(self.drop(torch.softmax(q @ k.mT, -1) @ v))
        return y


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.act(self.attn(self.norm(x)))
        return y


class Model(nn.Module):
    def __init__(self, depth: int = 2, width: int = 4) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.embed = nn.Embedding(7, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.proj = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(self.blocks(self.embed(x) + self.token))
        return y


def names(sites: Sites) -> list[str]:
    return [site.name for site in sites]


def refusal(ask: Callable[[], object]) -> str:
    """The one line of a refused selection."""
    with pytest.raises(SiteError) as refused:
        ask()
    line = str(refused.value)
    assert "\n" not in line
    return line
