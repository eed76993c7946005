"""What the tests of many sets at once share: a model with several sets that differ."""

from __future__ import annotations

from torch import nn

from polyadapt.core import Recipe, attach
from polyadapt.tests.law_models import LAYERS
from polyadapt.tests.law_table import stir


def resident(count: int, recipe: Recipe, at: str = "layer") -> nn.Module:
    """A model with sets s0, s1, ... that differ."""
    model = LAYERS["linear"].model().eval()
    for n in range(count):
        stir(attach(model, recipe, at=at, name=f"s{n}"), seed=n).freeze()
    return model
