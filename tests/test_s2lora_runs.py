"""S2-LoRA trained by AdaptedModule: exact zeros, resumed runs, the proof that sites act."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Generator, nn
from torch.utils.data import DataLoader, TensorDataset

from polyadapt.core import S2LoRA, load
from polyadapt.core.errors import SiteError
from polyadapt.core.live_ranks import ranks
from polyadapt.tests.saved_sets import INPUT, net
from polyadapt.tests.training_cases import Ones, StopAfter, quiet_trainer

pytestmark = pytest.mark.slow  # whole runs

AT = "blocks.*.qkv[q,v]"


def task(recipe: S2LoRA, backbone: nn.Module | None = None, at: Any = AT) -> Ones:
    return Ones(backbone or net(), recipe, at, lr=1e-2, seed=0)


def fit(made: Ones, ckpt: Path | None = None, **options: Any) -> Trainer:
    trainer = quiet_trainer(**{"max_epochs": 4, **options})
    data = TensorDataset(torch.randn(16, 3, 8, generator=Generator().manual_seed(1)))
    trainer.fit(made, DataLoader(data, batch_size=4), ckpt_path=ckpt)
    return trainer


def test_a_strong_l1_ends_with_exact_zeros_and_a_weak_one_with_none(tmp_path: Path) -> None:
    for l1, live in ((9.0, 0), (0.0, 4)):
        made = task(S2LoRA(rank=4, l1=l1, warmup=0.25))
        fit(made)
        assert {*ranks(made.adapters).values()} == {live}
        made.save_adapter(tmp_path / "set.safetensors")
        other = net()
        assert {*ranks(load(other, tmp_path / "set.safetensors")).values()} == {live}
        assert torch.equal(other(INPUT), net()(INPUT)) == (live == 0)


@pytest.mark.parametrize("sparsity", ["proximal", "loss"])
def test_a_resumed_run_is_the_uninterrupted_one(sparsity: Any, tmp_path: Path) -> None:
    recipe = S2LoRA(rank=4, sparsity=sparsity, l1=0.3, warmup=0.6)
    whole, first, second = (task(recipe) for _ in range(3))
    fit(whole)
    fit(first, callbacks=[StopAfter(2)]).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, ckpt=tmp_path / "half.ckpt")
    wanted, found = whole.state_dict(), second.state_dict()
    assert sorted(found)[:2] == ["adapter/.bank/A_8", "adapter/.bank/B_8"]
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert not all(torch.equal(t, wanted[name]) for name, t in first.state_dict().items())


@pytest.mark.parametrize("init", ["adalora", "lora"])
def test_a_site_that_nothing_calls_is_named_from_either_start(init: Any) -> None:
    """From B = 0 no coefficient has a gradient at the first step, and the proof waits for it."""
    recipe = S2LoRA(rank=2, init=init)
    fit(task(recipe))
    backbone = net()
    backbone.spare = nn.Linear(8, 8)
    with pytest.raises(SiteError, match=r"1 of 3 adapters .* do not act: spare"):
        fit(task(recipe, backbone, ["blocks.*.mlp", "spare"]))
