"""What the tests of low-rank methods share: one layer of every kind, and adapters at it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from polyadapt.core import DoRA, LoRA, select
from polyadapt.core.adapters.dora import DoRAAdapter
from polyadapt.core.adapters.lora import LoRAAdapter
from polyadapt.core.kinds import layer_at
from polyadapt.core.layers import FrozenLayer
from polyadapt.core.recipe import Adapter
from polyadapt.core.sites import Site
from polyadapt.tests.law_models import Conv1D


def layers() -> list[Any]:
    """(a backbone of one layer, an input) for every layer kind."""
    torch.manual_seed(1)
    reflect = nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode="reflect")
    numbers = torch.tensor([[0, 3, 4], [4, 1, 0]])
    return [
        pytest.param(nn.Sequential(nn.Linear(6, 5)), torch.randn(2, 3, 6), id="linear"),
        pytest.param(nn.Sequential(nn.Linear(6, 5, bias=False)), torch.randn(6), id="no bias"),
        pytest.param(nn.Sequential(Conv1D(6, 5)), torch.randn(2, 3, 6), id="transposed"),
        pytest.param(nn.Sequential(reflect), torch.randn(2, 3, 7, 8), id="conv2d"),
        pytest.param(
            nn.Sequential(nn.Conv1d(3, 5, 3, dilation=2)), torch.randn(2, 3, 9), id="conv1d"
        ),
        pytest.param(nn.Sequential(nn.Embedding(7, 5)), numbers, id="embedding"),
    ]


def site_at(model: nn.Module, at: str) -> tuple[Site, FrozenLayer]:
    """The one site that a pattern names, and its frozen layer."""
    (site,) = select(model, at)
    return site, layer_at(model, site)


def lora_at(model: nn.Module, recipe: LoRA) -> tuple[LoRAAdapter, FrozenLayer]:
    """A new adapter at `model[0]`, always the same one, and its frozen layer."""
    adapter, layer = _adapter_at(model, recipe)
    assert isinstance(adapter, LoRAAdapter)
    return adapter, layer


def dora_at(model: nn.Module, recipe: DoRA | None = None) -> tuple[DoRAAdapter, FrozenLayer]:
    """The same for DoRA, of rank 2 unless a recipe says otherwise."""
    adapter, layer = _adapter_at(model, recipe or DoRA(rank=2))
    assert isinstance(adapter, DoRAAdapter)
    return adapter, layer


def _adapter_at(model: nn.Module, recipe: LoRA) -> tuple[Adapter, FrozenLayer]:
    site, layer = site_at(model, "0")
    weight = layer.matrix().detach()
    return recipe.build(site, weight, torch.Generator().manual_seed(0)), layer


def stir(adapters: nn.Module, scale: float = 0.3) -> None:
    """Move every trained tensor away from its start, always in the same way."""
    with torch.no_grad():
        for n, parameter in enumerate(adapters.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n))
            parameter.add_(scale * noise)


def only_layer(model: nn.Module) -> Any:
    """The layer of `nn.Sequential(layer)`; mypy cannot tell its class."""
    return model[0]  # type: ignore[index]
