"""The laws on classes that others wrote: timm, open_clip, openai-whisper, transformers, torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import (
    AdaptError,
    BitFit,
    Bottleneck,
    DoRA,
    FullFineTuning,
    LayerNormTuning,
    LoRA,
    MoSA,
    Recipe,
    activate,
    attach,
    load,
)
from polyadapt.core.slots import WeightSlot
from polyadapt.tests.law_real_models import BATCH, OTHERS, TIMM, Real
from polyadapt.tests.law_table import stir

# Importing transformers, open_clip and whisper takes seconds: these stand for all in fast runs.
QUICK = ("timm ViT", "timm Swin V2", "nn.TransformerEncoder")
REAL = {**TIMM, **OTHERS}
RECIPES: dict[str, Recipe] = {
    "LoRA": LoRA(rank=2, alpha=4),
    "DoRA": DoRA(rank=2, alpha=4),
    "FullFineTuning": FullFineTuning(),
    "serial": Bottleneck(rank=2),
    "parallel_ffn": Bottleneck(rank=2, placement="parallel_ffn"),
    "MoSA": MoSA(rank=2, experts=2),
}
WEIGHTS = ("LoRA", "DoRA", "FullFineTuning")


def _marked(*values: str) -> Any:
    return pytest.param(*values, marks=[pytest.mark.slow] * (values[0] not in QUICK))


by_class = pytest.mark.parametrize("real", [_marked(name) for name in REAL])
by_merging = pytest.mark.parametrize(
    ("real", "method"), [_marked(name, method) for name in REAL for method in WEIGHTS]
)
by_both = pytest.mark.parametrize(
    ("real", "method"), [_marked(name, method) for name in REAL for method in RECIPES]
)


def _attach(real: Real, model: nn.Module, method: str, seed: int = 1, **settings: Any) -> Any:
    at = real.at if method in WEIGHTS else real.blocks
    generator = torch.Generator().manual_seed(seed)
    return attach(model, RECIPES[method], at=at, generator=generator, **settings)


@torch.no_grad()
def _run(real: Real, model: nn.Module) -> Tensor:
    return real.call(model)


def _apart(y: Tensor, z: Tensor) -> float:
    return float((y - z).abs().max() / y.abs().max())


@by_both
def test_a_fresh_set_acts_and_changes_no_bit(real: str, method: str) -> None:
    case = REAL[real]
    model = case.model()
    base = _run(case, model)
    adapters = _attach(case, model, method, probe=lambda: case.call(model))
    assert torch.equal(_run(case, model), base)
    stir(adapters)
    assert _apart(base, _run(case, model)) > 1e-3
    with activate(model, None):
        assert torch.equal(_run(case, model), base)


@by_both
def test_the_backbone_keeps_its_names_its_values_and_its_classes(real: str, method: str) -> None:
    case = REAL[real]
    model, base = case.model(), case.model()
    kinds = [type(m) for m in model.modules()]
    adapters = stir(_attach(case, model, method))
    for path, module in base.named_modules():
        own, here = module.state_dict(), model.get_submodule(path).state_dict()
        assert here.keys() == own.keys()
        assert all(torch.equal(here[key], own[key]) for key in own)
    model.load_state_dict(base.state_dict(), strict=True)
    adapters.detach()
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(_run(case, model), _run(case, base))


@by_merging
def test_merged_equals_unmerged_and_comes_back(real: str, method: str) -> None:
    case = REAL[real]
    model = case.model()
    adapters = stir(_attach(case, model, method))
    y = _run(case, model)
    adapters.merge()
    assert _apart(y, _run(case, model)) < 5e-6
    adapters.unmerge()
    assert torch.equal(_run(case, model), y)


@by_both
def test_a_file_gives_the_same_bits_on_a_new_model(real: str, method: str, tmp_path: Path) -> None:
    case = REAL[real]
    model, other = case.model(), case.model()
    stir(_attach(case, model, method)).save(tmp_path / "a.safetensors")
    load(other, tmp_path / "a.safetensors")
    assert torch.equal(_run(case, other), _run(case, model))


@by_both
def test_gradients_reach_every_adapter_tensor(real: str, method: str) -> None:
    case = REAL[real]
    model = case.model()
    adapters = stir(_attach(case, model, method))
    y = case.call(model)
    (y * torch.linspace(-1, 1, y.numel()).cos().view(y.shape)).sum().backward()
    missing = [n for n, p in adapters.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []
    assert all(p.grad is None for n, p in model.named_parameters() if "drawer" not in n)


@by_both
def test_a_mixed_batch_is_right_or_refused_by_name(real: str, method: str) -> None:
    case = REAL[real]
    model = case.model()
    base = _run(case, model)
    stir(_attach(case, model, method, name="a"))
    y = _run(case, model)
    names = [None, "a", None]
    if case.mixes and method in WEIGHTS:
        with pytest.raises(AdaptError, match=case.mixes), activate(model, per_sample=names):
            _run(case, model)
        return
    with activate(model, per_sample=names):
        mixed = _run(case, model)
    for part in range(0, len(y), BATCH):  # CLIP returns two parts
        assert torch.equal(mixed[part], base[part])
        assert torch.equal(mixed[part + 2], base[part + 2])
        assert _apart(y[part + 1], mixed[part + 1]) < 5e-6


@pytest.mark.parametrize("recipe", [BitFit(), LayerNormTuning()], ids=["BitFit", "norms"])
@by_class
def test_the_baselines_find_their_own_sites(real: str, recipe: Recipe) -> None:
    case = REAL[real]
    model = case.model()
    adapters = attach(model, recipe, probe=lambda: case.call(model))
    ends = ("bias",) if isinstance(recipe, BitFit) else ("bias", "weight")
    wanted = [
        name
        for name, parameter in case.model().named_parameters()
        if name.endswith(ends) and (isinstance(recipe, BitFit) or "norm" in name or "ln" in name)
    ]
    assert {site.name for site in adapters.sites} >= set(wanted)


@pytest.mark.slow
def test_open_clip_computes_an_adapted_weight_once_per_call_of_its_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = OTHERS["open_clip tower"]
    model = case.model()
    adapters = attach(model, LoRA(rank=2), at="transformer.resblocks.*.attn.in_proj_weight[q,v]")
    counts: Counter[str] = Counter()
    plain = WeightSlot.adapted

    def counting(slot: WeightSlot, names: Any) -> Tensor:
        counts[slot.path] += 1
        return plain(slot, names)

    monkeypatch.setattr(WeightSlot, "adapted", counting)
    for training in (True, False):
        case.call(model.train(training))
        _run(case, model)
    assert counts == {site.path: 4 for site in adapters.sites}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("method", WEIGHTS)
@torch.no_grad()
def test_a_padded_batch_of_an_encoder_is_adapted_as_nested_tensors(method: str) -> None:
    case = OTHERS["nn.TransformerEncoder"]
    model = case.model()
    x = torch.randn(BATCH, 5, 16)
    padded = torch.zeros(BATCH, 5, dtype=torch.bool)
    padded[1, 3:] = True
    base = model(x, src_key_padding_mask=padded)
    adapters = _attach(case, model, method, name="a")
    assert torch.equal(model(x, src_key_padding_mask=padded), base)
    stir(adapters)
    y = model(x, src_key_padding_mask=padded)
    with activate(model, None):
        assert torch.equal(model(x, src_key_padding_mask=padded), base)
    # The encoder looks at its first layer's weights before it calls it.
    refused = pytest.raises(AdaptError, match=r"layers\.0\..* is read outside the call")
    with refused, activate(model, per_sample=[None, "a", None]):
        model(x, src_key_padding_mask=padded)
    adapters.merge()
    assert _apart(y, model(x, src_key_padding_mask=padded)) < 5e-6
