"""What the tests of AdaLoRA share: a model, its adapters, a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, nn

from polyadapt.core import AdapterSet
from polyadapt.core.adapters.adalora import AdaLoRAAdapter


def chain(seed: int = 3, width: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def adalora(made: AdapterSet) -> list[AdaLoRAAdapter]:
    return [a for a in made.adapters.values() if isinstance(a, AdaLoRAAdapter)]


def train(
    model: nn.Module, made: AdapterSet, steps: range, total: int, optimiser: Any = None
) -> torch.optim.Optimizer:
    """Steps of a run of `total`, on a batch of their own each."""
    own: torch.optim.Optimizer = optimiser or torch.optim.AdamW(made.parameter_groups(0.05))
    for step in steps:
        generator = Generator().manual_seed(step)
        x, target = torch.randn(2, 8, 6, generator=generator)
        loss = (model(x) - target).square().mean() + made.penalty()
        own.zero_grad()
        loss.backward()
        own.step()
        made.after_step(step, total)
    return own
