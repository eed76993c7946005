"""Several sets at once: one after another on a whole batch, or one set per sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polyadapt.core import AdaptError, DoRA, LoRA, activate, attach, select, switch
from polyadapt.tests.law_models import BATCH, LAYERS, tokens
from polyadapt.tests.law_table import stir

# One after another


@pytest.mark.parametrize("slot", ["weight", "output"])
def test_several_sets_act_one_after_another(slot: Any) -> None:
    layer = nn.Linear(4, 3)
    model = nn.Sequential(layer)
    pairs = []
    for seed, name in enumerate(("a", "b")):
        adapters = attach(model, LoRA(rank=2, alpha=6), at=select(model, "0", slot=slot), name=name)
        (adapter,) = stir(adapters, seed).adapters.values()
        pairs.append(3 * adapter.B.detach() @ adapter.A.detach())  # type: ignore[operator]
    x = torch.randn(5, 4)
    with activate(model, ["a", "b"]):
        y = model(x)
    wanted = F.linear(x, model.state_dict()["0.weight"] + pairs[0] + pairs[1], layer.bias)
    assert torch.allclose(y, wanted, atol=1e-5)


def test_a_method_that_reads_the_frozen_weight_must_act_first() -> None:
    model = LAYERS["linear"].model()
    attach(model, LoRA(rank=2), at="layer", name="pets")
    attach(model, DoRA(rank=2), at="layer", name="cars")
    with activate(model, ["cars", "pets"]):
        model(tokens())
    with pytest.raises(AdaptError, match=r"'cars' \(DoRA\) .* name it before 'pets'"):
        switch(model, ["pets", "cars"])


def test_only_the_sets_that_act_require_grad() -> None:
    model = LAYERS["linear"].model()
    sets = [attach(model, LoRA(rank=2), at="layer", name=name) for name in ("a", "b")]
    switch(model, "a")
    assert [all(p.requires_grad for p in s.parameters()) for s in sets] == [True, False]
    sets[0].freeze()
    switch(model, ["a", "b"])
    assert [all(p.requires_grad for p in s.parameters()) for s in sets] == [False, True]


@pytest.mark.parametrize("names", ["c", ["a", "c"], ["a", "a"]])
def test_names_that_cannot_act_are_refused(names: Any) -> None:
    model = LAYERS["linear"].model()
    attach(model, LoRA(rank=2), at="layer", name="a")
    with pytest.raises(AdaptError, match=r"'c'; attached: \['a'\]|once at a time"):
        switch(model, names)
    with pytest.raises(AdaptError, match=r"names for the whole batch or per_sample, not both"):
        activate(model, "a", per_sample=["a"]).__enter__()


# Mixed batches


@pytest.mark.parametrize("layer", ["linear", "in_proj of attention", "matrix of the model"])
def test_a_mixed_batch_needs_one_name_per_sample(layer: str) -> None:
    model = LAYERS[layer].model()
    attach(model, LoRA(rank=2), at=LAYERS[layer].at, name="a")
    refused = pytest.raises(AdaptError, match=f"3 names were given for a batch of {BATCH}")
    with refused, activate(model, per_sample=["a", None, None]):
        model(tokens())


def test_a_merged_set_acts_once_in_a_batch_that_names_it() -> None:
    model = LAYERS["linear"].model()
    adapters = stir(attach(model, LoRA(rank=2), at="layer", name="a"))
    y = model(tokens())
    adapters.merge()
    merged = model(tokens())
    assert torch.allclose(merged, y, atol=1e-5)
    with activate(model, per_sample=["a"] * BATCH):
        assert torch.equal(model(tokens()), merged)
    with pytest.raises(AdaptError, match="'a' is merged into the weights: unmerge it first"):
        activate(model, per_sample=["a", None, None, None]).__enter__()


def test_attention_weights_of_a_mixed_batch_are_those_of_each_sample() -> None:
    model = nn.Sequential()
    model.attn = nn.MultiheadAttention(16, 2)  # tokens first, but its weights samples first
    stir(attach(model, LoRA(rank=2), at="attn.in_proj_weight[q,k]", name="a"))
    x = tokens().transpose(0, 1)
    with activate(model, per_sample=["a", None, None, "a"]):
        y, weights = model.attn(x, x, x)
    for n, name in enumerate(["a", None, None, "a"]):
        with activate(model, name):
            alone, own = model.attn(*3 * (x[:, n : n + 1],))
        assert torch.allclose(y[:, n], alone[:, 0], atol=1e-5)
        assert torch.allclose(weights[n], own[0], atol=1e-5)


def test_a_reader_that_keeps_state_is_not_run_twice_for_a_mixed_batch() -> None:
    model = LAYERS["linear that is read"].model()
    attach(model, LoRA(rank=2), at="layer", name="a")
    calls: list[int] = []
    model.get_submodule("front").register_forward_hook(lambda *a: calls.append(1))
    refused = pytest.raises(AdaptError, match="Reads keeps state between calls")
    with refused, activate(model, per_sample=["a", None, None, None]):
        model(tokens())
    with activate(model, "a"):
        model(tokens())
    assert calls == [1]


def test_a_weight_read_outside_of_its_reader_cannot_be_mixed() -> None:
    model: Any = LAYERS["linear that is read"].model()
    attach(model, LoRA(rank=2), at="layer", name="a")
    refused = pytest.raises(AdaptError, match=r"layer\.weight is read outside the call")
    with refused, activate(model, per_sample=["a", None]):
        _ = model.layer.weight


def test_a_set_on_the_weight_must_be_named_before_one_on_the_output() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    attach(model, DoRA(rank=2), at="0", name="dora")
    attach(model, LoRA(rank=2), at=select(model, "0", slot="weight"), name="lora")
    with pytest.raises(AdaptError, match="name 'lora' first"), activate(model, ["dora", "lora"]):
        pass
