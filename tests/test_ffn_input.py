"""The state that enters a block's MLP branch, in the layouts that blocks have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polyadapt.core import AdaptError, Bottleneck, attach
from polyadapt.core.errors import SiteError
from polyadapt.tests.law_models import WIDTH, Block, tokens

RECIPE = Bottleneck(rank=2, placement="parallel_ffn")


def _given(model: nn.Module, *inputs: Tensor) -> Tensor:
    """What the adapter at the model's first block was given beside the block's output."""
    adapters = attach(model, RECIPE, at="0")
    adapter: Any = adapters.modules_in_order[0]
    seen: list[Tensor] = []
    plain = adapter.output

    def spy(x: Tensor, y: Tensor, layer: Any) -> Any:
        seen.append(x)
        return plain(x, y, layer)

    adapter.output = spy
    model.get_submodule("0")(*inputs)
    (state,) = seen
    return state


class PostNorm(nn.Module):
    """x + norm2(mlp(x)): the MLP comes first, as in Swin V2."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.norm2(self.mlp(x))
        return y


class ByKeyword(Block):
    """Calls its branch with a keyword."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mlp(self.norm2(input=x))
        return y


@pytest.mark.parametrize("block", [Block, PostNorm, ByKeyword])
def test_the_state_is_what_the_branch_adds_to(block: type[nn.Module]) -> None:
    x = tokens()
    assert _given(nn.Sequential(block()), x) is x


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_the_state_in_the_layers_of_torch(kind: Any, norm_first: bool) -> None:
    layer = kind(WIDTH, 2, 24, dropout=0.0, norm_first=norm_first)
    last_norm = layer.norm3 if hasattr(layer, "norm3") else layer.norm2
    seen: list[Tensor] = []
    begin = last_norm if norm_first else layer.linear1
    begin.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs = (tokens(), tokens()) if hasattr(layer, "norm3") else (tokens(),)
    state = _given(nn.Sequential(layer), *inputs)
    assert state is seen[0]


class Sleeping(Block):
    """Skips its branch."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_a_block_that_skips_its_branch_is_named() -> None:
    model = nn.Sequential(Sleeping())
    attach(model, RECIPE, at="0")
    with pytest.raises(AdaptError, match="0: its MLP branch was not called"):
        model(tokens())


def test_a_block_without_a_branch_is_refused_with_its_children() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with pytest.raises(SiteError, match=r"0 has no MLP branch that we know .* children: 0, 1"):
        attach(model, RECIPE, at="0")


class Checkpointed(Block):
    """Its branch alone is recomputed in backward, after the block's call has ended."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + checkpoint(lambda z: self.mlp(self.norm2(z)), x, use_reentrant=False)
        return y


def test_a_recomputed_branch_leaves_nothing_in_a_copy() -> None:
    model = nn.Sequential(Checkpointed())
    attach(model, RECIPE, at="0")
    model(tokens()).sum().backward()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens()), model(tokens()))
