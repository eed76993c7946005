"""The files of audio-visual sets: what they bring back, and the plain Whisper without video."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from polyadapt.core import AdaptError, LoRA, activate, attach, sets_of, switch
from polyadapt.speech.avsr import fusion_of, load_avsr
from polyadapt.speech.decoding import Decoding
from polyadapt.tests.avsr_cases import SIZES, fit, pairs, plain_states, task
from polyadapt.tests.law_table import stir
from polyadapt.tests.speech_models import tiny_speech, tiny_whisper


def _saved(folder: Path, name: str, seed: int) -> Path:
    """A trained set's file, with running statistics of its own."""
    one = task(stage=3, set_name=name, label={"category": name, "snr": [-15, 30]})
    stir(one.adapters, seed)
    with torch.no_grad():
        for parameter in one.fusion.parameters():
            parameter.add_(torch.randn_like(parameter) / 20)
        for _ in range(3):
            one.fusion(torch.randn(2, 80, 32) * seed + seed, torch.randn(2, 8, 6))
    one.save_adapter(folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def test_a_then_b_then_a_gives_a_s_bits_again(tmp_path: Path) -> None:
    """Each set has its own running statistics; they are in its file, with how many were counted."""
    speech, batch = tiny_speech(), pairs()
    a = load_avsr(speech, _saved(tmp_path, "babble", 1))
    first = a.states(batch.noisy, batch.video, batch.frames)
    b = load_avsr(speech, _saved(tmp_path, "music", 2))
    other = b.states(batch.noisy, batch.video, batch.frames)
    assert not torch.allclose(first, other, atol=1e-2)
    assert torch.equal(a.states(batch.noisy, batch.video, batch.frames), first)
    counted = {n: t for n, t in a.fusion.state_dict().items() if "num_batches" in n}
    assert {int(t) for t in counted.values()} == {3}
    assert all(t.dtype == torch.int64 for t in counted.values())
    means = [
        next(t for n, t in one.fusion.state_dict().items() if n.endswith("running_mean"))
        for one in (a, b)
    ]
    assert not torch.equal(*means)
    switch(speech.model, "babble")
    assert torch.equal(b.states(batch.noisy, batch.video, batch.frames), other)


def test_a_file_s_fusion_module_is_the_trained_one(tmp_path: Path) -> None:
    one, file = task(), tmp_path / "set.safetensors"
    fit(one, tmp_path)
    one.save_adapter(file)
    loaded = load_avsr(tiny_speech(), file)
    assert loaded.fusion.sizes == SIZES
    assert not loaded.fusion.training
    for name, tensor in one.fusion.state_dict().items():
        assert torch.equal(loaded.fusion.state_dict()[name], tensor), name
    assert one.fusion.audio.blocks[0].body[1].num_batches_tracked == 2  # type: ignore[union-attr,index]
    json.dumps(loaded.adapters.extra)


def test_a_set_of_one_whisper_class_acts_alike_on_the_other(tmp_path: Path) -> None:
    file, batch = _saved(tmp_path, "babble", 1), pairs()
    ours = load_avsr(tiny_speech("openai"), file)
    theirs = load_avsr(tiny_speech("transformers"), file)
    found = [one.states(batch.noisy, batch.video, batch.frames) for one in (ours, theirs)]
    assert torch.allclose(found[0], found[1], atol=1e-4)


def test_without_video_it_is_the_plain_whisper_bit_for_bit(tmp_path: Path) -> None:
    """After training, and for what it says, too; the frozen weights are as they were."""
    batch = pairs()
    one, fresh = task(stage=3), tiny_speech()
    before = {n: p.clone() for n, p in tiny_whisper().named_parameters()}
    stir(one.adapters)
    fit(one, tmp_path)
    one.save_adapter(tmp_path / "set.safetensors")
    for name, parameter in before.items():
        assert torch.equal(one.backbone.get_parameter(name), parameter), name
    tokens = torch.tensor([[50257, 50362, 464]])
    wanted = plain_states(batch.noisy)
    with torch.no_grad(), activate(one.backbone, None):
        states = one.speech.encode(batch.noisy)
        assert torch.equal(states, wanted)
        assert torch.equal(one.speech.logits(tokens, states[:1]), fresh.logits(tokens, wanted[:1]))
    loaded = load_avsr(tiny_speech(), tmp_path / "set.safetensors")
    assert torch.equal(loaded.states(batch.noisy, None), wanted)
    asked = Decoding(longest=4)
    assert [r.tokens for r in loaded.decode(batch.noisy, None, asked=asked)] == [
        r.tokens for r in fresh.decode(batch.noisy, asked)
    ]
    with_video = loaded.states(batch.noisy, batch.video, batch.frames)
    assert not torch.allclose(with_video, wanted, atol=1e-2)
    assert len(loaded.decode(batch.noisy, batch.video, batch.frames, asked)) == 2


def test_a_file_of_another_task_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    made = attach(tiny_whisper(), LoRA(rank=2), "encoder.blocks.*.attn.query")
    made.save(tmp_path / "plain.safetensors")
    speech = tiny_speech()
    with pytest.raises(AdaptError, match="is no audio-visual set"):
        load_avsr(speech, tmp_path / "plain.safetensors")
    assert sets_of(speech.model) == {}


def test_a_fusion_module_that_is_not_of_its_stated_sizes_is_refused(tmp_path: Path) -> None:
    loaded = load_avsr(tiny_speech(), _saved(tmp_path, "babble", 1)).adapters
    sizes = loaded.extra["fusion"]
    loaded.extra["fusion"] = {**sizes, "layers": 2}
    with pytest.raises(AdaptError, match="not of the sizes that its file states") as refusal:
        fusion_of(loaded)
    assert "\n" not in str(refusal.value)
    loaded.extra["fusion"] = {**sizes, "window": 0}
    with pytest.raises(AdaptError, match="window=0"):
        fusion_of(loaded)


def test_the_same_seed_draws_the_same_fusion_module_and_no_other_number() -> None:
    torch.manual_seed(5)
    after = torch.rand(1)
    torch.manual_seed(5)
    one, other = task(seed=1).fusion.state_dict(), task(seed=1).fusion.state_dict()
    assert torch.equal(torch.rand(1), after)
    assert all(torch.equal(one[name], other[name]) for name in one)
