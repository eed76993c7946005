"""What the tests of Block-LoRA share."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor, nn

from polyadapt.core import AdapterSet, LoRA, attach
from polyadapt.core.adapters.block_lora import RankSplitAdapter
from polyadapt.core.recipe import Adapter
from polyadapt.tests.factor_cases import site_at

SPLITS = pytest.mark.parametrize("split", ["rank", "input"])


def seeded() -> Generator:
    return Generator().manual_seed(5)


def made_at(model: nn.Module, recipe: LoRA, at: str = "*", name: str = "a") -> AdapterSet:
    return attach(model, recipe, at, name, generator=seeded())


def rank_split(made: AdapterSet) -> list[RankSplitAdapter]:
    return [a for a in made.adapters.values() if isinstance(a, RankSplitAdapter)]


def numbers(*shape: int) -> Tensor:
    """Always the same for one shape, and unlike those of others."""
    return torch.randn(shape, generator=Generator().manual_seed(hash(shape)))


def update(adapter: Adapter, x: Tensor, d_out: int) -> Tensor:
    """What the adapter adds to a linear layer without bias and of weight zero."""
    model = nn.Sequential(nn.Linear(x.shape[-1], d_out))
    _, layer = site_at(model, "0")
    return adapter.output(x, torch.zeros(*x.shape[:-1], d_out), layer)  # type: ignore[operator,no-any-return]
