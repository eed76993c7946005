"""What the tests of combining share: random sets in fp64, their dense updates, distances."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from polyadapt.core import AdapterSet, Recipe, attach
from polyadapt.core.recipe import LowRank

TINY = 1e-13  # rounding of fp64, with room for a few operations
A, B = "blocks.*.qkv[q,v]", "blocks.*.mlp"


def trained(
    model: nn.Module, name: str, recipe: Recipe, at: str | list[str] | None, seed: int = 0
) -> AdapterSet:
    """A set of random numbers in fp64, which shows errors that fp32 would hide."""
    made = attach(model, recipe, at, name)
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
    return made.double()


def deltas(adapters: AdapterSet) -> dict[str, Tensor]:
    """The dense update at every site, from the factors."""
    found = {}
    for name, adapter in adapters.adapters.items():
        assert isinstance(adapter, LowRank)
        a, b, p, scale = adapter.factors()
        found[name] = (scale * (b if p is None else b * p) @ a).detach()
    return found


def wanted(*weighted: tuple[AdapterSet, float]) -> dict[str, Tensor]:
    """The dense weighted sum at every site of any set."""
    total: dict[str, Tensor] = {}
    for adapters, weight in weighted:
        for name, delta in deltas(adapters).items():
            total[name] = total.get(name, torch.zeros(())) + weight * delta
    return total


def far(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The relative Frobenius distance over all sites."""
    assert found.keys() == expected.keys()
    missed = math.hypot(*(float((found[n] - expected[n]).norm()) for n in expected))
    return missed / (math.hypot(*(float(e.norm()) for e in expected.values())) or 1.0)
