"""Law 10 under the checkpointing switches of transformers, and under data-parallel training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from polyadapt.core import AdaptError, Bottleneck, LoRA, Recipe, activate, attach, sets_of
from polyadapt.tests import law_ddp
from polyadapt.tests.law_models import tokens
from polyadapt.tests.law_table import stir

pytestmark = pytest.mark.slow  # importing transformers alone takes seconds

Case = tuple[nn.Module, Tensor, str, str]  # model, input, its layers, its blocks


def _vit() -> Case:
    from transformers import ViTConfig, ViTModel

    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**shape, intermediate_size=48, image_size=16, patch_size=8)
    image = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = ViTModel(config, add_pooling_layer=False)
    return model, image.requires_grad_(), "layers.*.attention.{q_proj,v_proj}", "layers.*"


def _gpt2() -> Case:
    from transformers import GPT2Config, GPT2Model

    shape: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 8}
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(**shape, **ends, vocab_size=11, use_cache=False)
    return GPT2Model(config), torch.arange(8).view(2, 4), "h.*.attn.c_attn[q,v]", "h.*"


def _trained(
    make: Callable[[], Case], recipe: Recipe, reentrant: bool | None, backward: str
) -> list[Tensor | None]:
    """Gradients of both sets after a step under b."""
    torch.manual_seed(0)
    model, x, layers, blocks = make()
    at = blocks if isinstance(recipe, Bottleneck) else layers
    for seed, name in enumerate("ab"):
        stir(attach(model, recipe, at=at, name=name), seed)
    if reentrant is not None:
        model.activation_checkpointing_enable(  # type: ignore[operator]
            activation_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    model.train()
    torch.manual_seed(1)  # of the dropouts
    with activate(model, "b"):
        y = model(x).last_hidden_state
    loss = (y * torch.linspace(-1, 1, y.numel()).cos().view(y.shape)).sum()
    if backward == "in a thread":
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    else:
        with activate(model, backward):
            loss.backward()
    return [p.grad for name in "ab" for p in sets_of(model)[name].parameters()]


@pytest.mark.parametrize("backward", ["a", "b", "in a thread"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", [LoRA(rank=2), Bottleneck(rank=2)], ids=["LoRA", "serial"])
@pytest.mark.parametrize("make", [_vit, _gpt2])
def test_the_switch_of_transformers_replays(
    make: Callable[[], Case], recipe: Recipe, reentrant: bool, backward: str
) -> None:
    plain = _trained(make, recipe, None, "b")
    found = _trained(make, recipe, reentrant, backward)
    assert [g is None for g in found] == [g is None for g in plain]
    assert any(g is not None for g in plain)
    for ours, wanted in zip(found, plain, strict=True):
        if ours is not None and wanted is not None:
            assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [_vit, _gpt2])
def test_the_state_of_a_branch_inside_a_checkpoint_keeps_its_gradient(
    make: Callable[[], Case],
) -> None:
    recipe = Bottleneck(rank=2, placement="parallel_ffn")
    plain = _trained(make, recipe, None, "b")
    for ours, wanted in zip(_trained(make, recipe, False, "a"), plain, strict=True):
        if ours is not None and wanted is not None:
            assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-6)
    # A reentrant checkpoint runs the branch without grad: the adapter beside it is outside of it.
    with pytest.raises(AdaptError, match=r"branch ran without grad .* use_reentrant=False"):
        _trained(make, recipe, True, "b")


def test_two_processes_with_checkpoints_train_as_one_on_the_whole_batch(tmp_path: Path) -> None:
    spawn(law_ddp.work, args=(str(tmp_path),), nprocs=2)
    alone = law_ddp.adapted()
    wanted = law_ddp.steps(alone, alone, tokens())
    start = list(sets_of(law_ddp.adapted())["b"].parameters())
    for rank in range(2):
        for ours, whole, before in zip(
            torch.load(tmp_path / f"{rank}.pt"), wanted, start, strict=True
        ):
            assert torch.allclose(ours, whole, atol=1e-6)
            assert not torch.allclose(ours, before, atol=1e-4)
