"""The output slots of low-rank methods through `lowrank_linear`, as on a GPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import AdaLoRA, BlockLoRA, LoRA, Recipe, S2LoRA, attach
from polyadapt.core.adapters import lora
from polyadapt.core.kernels.lowrank_linear import lowrank_linear
from polyadapt.tests.factor_cases import layers, site_at, stir

RECIPES = [
    pytest.param(LoRA(rank=2, alpha=3), id="LoRA"),
    pytest.param(LoRA(rank=2, dropout=0.5), id="dropout"),
    pytest.param(S2LoRA(rank=2, alpha=3), id="S2LoRA"),
    pytest.param(AdaLoRA(rank=2), id="AdaLoRA"),
    pytest.param(BlockLoRA(rank=2, blocks=2), id="BlockLoRA"),
]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Every branch goes through the op; the shapes of the bases."""
    bases: list[tuple[int, ...]] = []

    def recorded(*args: Any, base: Tensor, **options: Any) -> Tensor:
        bases.append(tuple(base.shape))
        return lowrank_linear(*args, base=base, **options)

    def fuses(*_: Any) -> bool:
        return True

    monkeypatch.setattr(lora, "lowrank_linear", recorded)
    monkeypatch.setattr(lora, "_fuses", fuses)
    return bases


def results(model: nn.Module, x: Tensor, learning: Sequence[Tensor]) -> list[Tensor]:
    torch.manual_seed(3)  # of the dropout
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *learning])]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("layer", "at"), [("0", "0"), ("qkv", "qkv[q,v]")], ids=["whole", "parts"])
def test_through_the_op_a_method_is_what_it_is_without(
    recipe: Recipe, layer: str, at: str, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict({layer: nn.Linear(4, 12)})).requires_grad_(False)
    made = attach(model, recipe, at=at)
    stir(made)
    x = torch.randn(2, 3, 4, requires_grad=True)
    learning = [p for p in made.parameters() if p.requires_grad]
    plain = results(model, x, learning)
    bases = request.getfixturevalue("on_a_gpu")
    torch.testing.assert_close(results(model, x, learning), plain, rtol=1e-5, atol=1e-5)
    assert bases == ([(2, 3, 12)] if at == "0" else [(2, 3, 4)] * 2)


def test_under_autocast_the_branch_has_the_dtype_of_the_output(
    on_a_gpu: list[tuple[int, ...]],
) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapters = attach(model, LoRA(rank=2), at="0")
    stir(adapters)
    x = torch.randn(4, 6)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        moved = model(x)
    moved.float().sum().backward()
    assert moved.dtype == torch.bfloat16
    torch.testing.assert_close(moved.float(), exact, rtol=0.03, atol=0.03)
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in adapters.parameters())
    assert len(on_a_gpu) == 2


@pytest.mark.parametrize(("model", "x"), layers())
def test_the_op_is_taken_on_a_gpu_by_linear_layers_alone(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def takes(_: Any) -> bool:
        return True

    monkeypatch.setattr(lora, "runs_kernel", takes)
    _, layer = site_at(model, "0")
    there, here = (cast(Tensor, SimpleNamespace(is_cuda=cuda)) for cuda in (True, False))
    assert lora._fuses(x, there, layer) is ("linear" in layer.kind)
    assert not lora._fuses(x, here, layer)
    inside = torch.func.vmap(lambda t: t * lora._fuses(t, there, layer))(torch.ones(2, 3))
    assert not inside.any()
