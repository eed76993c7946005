"""A factor that is written within an activation is seen by the next forward."""

from __future__ import annotations

import pytest
import torch

from polyadapt.core import LoRA, activate, sets_of
from polyadapt.tests.law_models import BATCH, tokens
from polyadapt.tests.resident_sets import resident


@pytest.mark.parametrize("data", [False, True], ids=["in place", "through .data"])
def test_a_factor_written_within_an_activation_is_seen(data: bool) -> None:
    model, x = resident(2, LoRA(rank=2)), tokens()
    factor = sets_of(model)["s0"].get_parameter("modules_in_order.0.B")
    with torch.no_grad(), activate(model, per_sample=["s0"] * BATCH):
        before = model(x)
        if data:
            factor.data = torch.zeros_like(factor)
        else:
            factor.zero_()
        after = model(x)
    with torch.no_grad(), activate(model, None):
        assert torch.equal(after, model(x))
        assert not torch.equal(before, after)


def test_a_factor_that_an_optimiser_wrote_within_an_activation_is_seen() -> None:
    """A fused optimiser raises no versions."""
    model, x = resident(2, LoRA(rank=2)), tokens()
    adapters = sets_of(model)["s0"]
    adapters.trainable = True
    optimiser = torch.optim.AdamW(adapters.parameters(), lr=0.1, fused=True)
    with activate(model, per_sample=["s0"] * BATCH):
        with torch.no_grad():
            model(x)
        model(x).square().sum().backward()
        optimiser.step()
        with torch.no_grad():
            after = model(x)
        assert torch.equal(after, model(x))
