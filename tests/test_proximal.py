"""The proximal step: exact zeros, the group's own rate, a warm-up, resumed and accumulated runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from polyadapt.core import Adapter, AdaptError
from polyadapt.core.adapters.lora import LoRA
from polyadapt.core.optim.proximal import proximal_step, sparse_group
from polyadapt.tests.training_cases import Ones, StopAfter, quiet_trainer


def sgd(values: list[float], l1: float, lr: float = 0.1, warmup: int | float = 0) -> Any:
    parameter = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    group = sparse_group({"params": [parameter]}, l1, warmup)
    return torch.optim.SGD([group], lr=lr), parameter


def test_the_hand_example() -> None:
    optimizer, p = sgd([0.3, -0.05, 0.1], l1=1.0)
    proximal_step(optimizer, 1)
    assert p.tolist() == pytest.approx([0.2, 0.0, 0.0])
    assert p[1:].count_nonzero() == 0  # not merely close


def test_it_is_one_soft_threshold_and_no_double_dead_zone() -> None:
    optimizer, p = sgd([0.05, 0.15, 0.25, -0.15, -0.3], l1=1.0)
    proximal_step(optimizer, 1)
    assert p.tolist() == pytest.approx([0.0, 0.05, 0.15, -0.05, -0.2])


def test_the_threshold_follows_the_rate_of_the_group() -> None:
    optimizer, p = sgd([1.0], l1=0.5, lr=0.2)
    proximal_step(optimizer, 1)
    assert p.item() == pytest.approx(0.9)
    optimizer.param_groups[0]["lr"] = 0.02
    proximal_step(optimizer, 2)
    assert p.item() == pytest.approx(0.89)


def test_other_groups_are_left_alone() -> None:
    optimizer, sparse = sgd([1.0], l1=1.0)
    dense = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [dense]})
    proximal_step(optimizer, 1)
    assert (sparse.item(), dense.tolist()) == (pytest.approx(0.9), [1.0, 1.0])


@pytest.mark.parametrize("warmup", [3, 0.3])
def test_nothing_is_shrunk_before_the_end_of_the_warm_up(warmup: int | float) -> None:
    optimizer, p = sgd([1.0], l1=1.0, warmup=warmup)
    values = []
    for step in range(1, 6):
        proximal_step(optimizer, step, total=10)
        values.append(p.item())
    assert values == pytest.approx([1.0, 1.0, 1.0, 0.9, 0.8])


def test_a_share_of_an_unknown_number_of_steps_is_refused() -> None:
    optimizer, _ = sgd([1.0], l1=1.0, warmup=0.3)
    with pytest.raises(AdaptError, match="needs the number of steps"):
        proximal_step(optimizer, 1)


def test_a_coefficient_leaves_zero_when_its_gradient_keeps_its_sign() -> None:
    """Adam moves by lr then, more than lr * l1; a gradient of alternating sign moves less."""
    p = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([sparse_group({"params": [p]}, l1=0.5, warmup=20)], lr=0.01)
    for step in range(1, 201):
        p.grad = torch.tensor([1e-3, 1e-3 if step % 2 else -1e-3])
        optimizer.step()
        proximal_step(optimizer, step)
    assert p[0].item() == pytest.approx(-(20 * 0.01 + 180 * 0.005), rel=1e-2)
    assert p[1].item() == 0.0


@dataclass(frozen=True, kw_only=True)
class SparseLoRA(LoRA):
    """LoRA whose B is shrunk."""

    l1: float = 0.5
    quiet: int | float = 0.0

    def parameter_groups(
        self, adapters: Mapping[str, Adapter], lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        by_name: dict[str, list[nn.Parameter]] = {"A": [], "B": []}
        for adapter in adapters.values():
            for name, parameter in adapter.named_parameters():
                by_name[name].append(parameter)
        sparse = {"params": by_name["B"], "lr": lr, "weight_decay": 0.0}
        dense = {"params": by_name["A"], "lr": lr, "weight_decay": 0.0}
        return [dense, sparse_group(sparse, self.l1, self.quiet)]


def task(recipe: LoRA) -> Ones:
    torch.manual_seed(0)
    return Ones(nn.Sequential(nn.Linear(4, 4)), recipe, "0", lr=0.1, warmup=0.0, seed=0)


def fit(made: Ones, ckpt: str | None = None, epochs: int = 2, **options: Any) -> Trainer:
    trainer = quiet_trainer(**{"max_epochs": epochs, **options})
    data = TensorDataset(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)))
    trainer.fit(made, DataLoader(data, batch_size=2), ckpt_path=ckpt)
    return trainer


def factor(made: Ones) -> Tensor:
    found = made.adapters.state_dict()["0/B"]
    return found.clone()


def test_a_module_shrinks_after_every_optimiser_step_at_its_rate() -> None:
    shrunk, plain = task(SparseLoRA(rank=2)), task(SparseLoRA(rank=2, l1=0.0))
    fit(shrunk, max_steps=1, epochs=-1)
    fit(plain, max_steps=1, epochs=-1)
    wanted = nn.functional.softshrink(factor(plain), 0.1 * 0.5)
    assert torch.equal(factor(shrunk), wanted)
    assert bool(wanted.any())


def test_a_module_shrinks_nothing_during_the_warm_up() -> None:
    shrunk = task(SparseLoRA(rank=2, quiet=0.5))
    plain = task(SparseLoRA(rank=2, l1=0.0))
    for made in (shrunk, plain):
        fit(made, limit_train_batches=2, epochs=1)  # of 2 steps 1 is quiet, the last one is not
    assert not torch.equal(factor(shrunk), factor(plain))
    shrunk = task(SparseLoRA(rank=2, quiet=2))
    fit(shrunk, limit_train_batches=2, epochs=1)
    assert torch.equal(factor(shrunk), factor(plain))


def test_accumulated_gradients_are_one_step() -> None:
    """Four batches of two in one step are what one batch of eight is."""
    accumulated, whole = task(SparseLoRA(rank=2)), task(SparseLoRA(rank=2))
    fit(accumulated, epochs=1, accumulate_grad_batches=4)
    own = torch.optim.AdamW(whole.adapters.parameter_groups(0.1))
    data = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    whole.training_loss([data]).backward()
    own.step()
    proximal_step(own, 1, 1)
    assert torch.allclose(factor(accumulated), factor(whole), atol=1e-6)


def test_a_resumed_run_shrinks_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, first, second = (task(SparseLoRA(rank=2, quiet=0.25)) for _ in range(3))
    fit(whole, epochs=4)

    trainer = fit(first, epochs=4, callbacks=[StopAfter(2)])
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(second, str(tmp_path / "half.ckpt"), epochs=4)
    assert torch.equal(factor(second), factor(whole))
    assert not torch.equal(factor(first), factor(whole))
