"""Audio-visual sets: their losses, stages, sizes, files, and the plain Whisper without video."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from whisper.model import AudioEncoder, TextDecoder

from polyadapt.core import AdaptError, LoRA, activate, attach
from polyadapt.speech.av_plan import STAGES, Levels, category_sets, level_sets
from polyadapt.speech.avsr import AudioVisualDistillation, mel_loss
from polyadapt.speech.fusion import Fusion
from polyadapt.speech.model import speech_of
from polyadapt.speech.names import sites_for
from polyadapt.speech.scenes import Between, synthetic_scenes
from polyadapt.tests.avsr_cases import SIZES, TinyWhisper, fit, pairs, plain_states, task
from polyadapt.tests.law_table import stir
from polyadapt.tests.speech_models import tiny_speech

pytestmark = pytest.mark.slow

# Sizes (on the meta device: no number is computed)


@pytest.mark.parametrize(
    ("width", "layers", "modules", "added", "whisper"),
    [(512, 6, 72, 4_718_592, 71_825_920), (768, 12, 144, 14_155_776, 240_582_912)],
    ids=["base", "small"],
)
def test_lora_on_all_attention_has_the_published_size(
    width: int, layers: int, modules: int, added: int, whisper: int
) -> None:
    heads = width // 64
    model = nn.Module()  # whisper's own class makes a sparse buffer, which that device has not
    with torch.device("meta"):
        model.encoder = AudioEncoder(80, 1500, width, heads, layers)
        model.decoder = TextDecoder(51865, 448, width, heads, layers)
    assert sum(p.numel() for p in model.parameters()) == whisper
    made = attach(model, LoRA(rank=64), sites_for("openai", "attention"))
    assert len(made.sites) == modules
    assert made.trainable_count() == added
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == added


# Losses


def test_nothing_is_lost_where_mel_and_states_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    one = task()
    same = pairs()
    monkeypatch.setattr(one.fusion, "restored", lambda mel, video, frames: same.clean)
    with torch.no_grad():
        losses = one.losses(same)  # B = 0: the adapted encoder is the frozen one
    assert [float(v) for v in losses.values()] == [0, 0, 0]


def test_the_mel_s_loss_does_not_see_past_a_clip_s_end() -> None:
    clean, frames = torch.randn(2, 80, 40), torch.tensor([32, 20])
    predicted = clean + 0.5
    assert mel_loss(predicted, clean, frames) == pytest.approx(0.5)
    for clip, length in enumerate(frames.tolist()):
        predicted[clip, :, length:] = 1e6
    assert mel_loss(predicted, clean, frames) == pytest.approx(0.5)
    predicted[1, :, 19] += 2.0  # one of 52 frames
    assert mel_loss(predicted, clean, frames) == pytest.approx(0.5 + 2 / 52)


def test_the_loss_is_half_the_mel_s_and_the_states_mean_absolute_error() -> None:
    one, batch = task(), pairs()
    stir(one.adapters)
    with torch.no_grad():
        losses = one.losses(batch)
        mel, states = one(batch)
    wanted = (states - plain_states(batch.clean)).abs().mean()
    assert losses["states"] == pytest.approx(float(wanted), rel=1e-4)
    assert losses["mel"] == pytest.approx(float(mel_loss(mel, batch.clean, batch.frames)) / 2)
    assert losses["loss"] == pytest.approx(float(losses["mel"] + losses["states"]))
    assert set(losses) == {"loss", "mel", "states"}


def test_the_last_stages_also_learn_what_the_frozen_whisper_says() -> None:
    """The targets are its greedy tokens on clean speech; the prompt is no target."""
    one, batch = task(stage=3), pairs()
    stir(one.adapters)
    plain = tiny_speech()
    from polyadapt.speech.decoding import Decoding

    said = [r.tokens for r in plain.decode(batch.clean, Decoding(longest=3))]
    with torch.no_grad(), activate(one.backbone, None):
        inputs, targets = one._taught(one.speech.encode(batch.clean))
    prompt = [50257, 50362]
    assert [line[: 2 + len(s)] for line, s in zip(inputs.tolist(), said, strict=True)] == [
        [*prompt, *s] for s in said
    ]
    assert [[t for t in line if t != -100] for line in targets.tolist()] == [
        [*s, 50256] for s in said
    ]
    assert (targets[:, 0] == -100).all()
    with torch.no_grad():
        losses = one.losses(batch)
        logits = one.speech.logits(inputs, one(batch)[1]).log_softmax(-1)
    likely = [
        float(logits[row, place, target])
        for row, line in enumerate(targets.tolist())
        for place, target in enumerate(line)
        if target != -100
    ]
    assert losses["tokens"] == pytest.approx(-sum(likely) / len(likely), rel=1e-4)


def test_past_a_clip_s_end_whisper_gets_the_noisy_mel_s_silence_or_zeros() -> None:
    batch = pairs()
    fusion = Fusion(SIZES).eval()
    zeros = Fusion(replace(SIZES, zero_fill=True)).eval()
    zeros.load_state_dict(fusion.state_dict())
    with torch.no_grad():
        whole = fusion(batch.noisy[..., :32], batch.video)
        ours = fusion.restored(batch.noisy, batch.video, batch.frames)
        public = zeros.restored(batch.noisy, batch.video, batch.frames)
    for clip, length in enumerate([32, 28]):
        assert torch.equal(ours[clip, :, :length], whole[clip, :, :length])
        assert torch.equal(ours[clip, :, length:], batch.noisy[clip, :, length:])
        assert torch.equal(public[clip, :, :length], whole[clip, :, :length])
        assert not public[clip, :, length:].any()
    with pytest.raises(AdaptError, match="the video lasts 32 mel frames, but the mel has 28"):
        fusion.restored(batch.noisy[..., :28], batch.video)
    with pytest.raises(AdaptError, match=r"the video is \[6\]"):
        fusion.restored(batch.noisy, batch.video[0, 0])


# Stages


@pytest.mark.parametrize(("stage", "adapted"), [(1, 8), (2, 8), (3, 24), (4, 24)])
def test_a_stage_trains_what_its_row_says_and_nothing_else(stage: int, adapted: int) -> None:
    one = task(stage=stage)
    stir(one.adapters)
    one.training_loss(pairs()).backward()
    assert len(one.adapters.sites) == adapted  # 2 blocks x 4 in the encoder, 2 x 8 in the decoder
    assert all(p.grad is not None and bool(p.grad.any()) for p in one.adapters.parameters())
    assert all(p.grad is not None for p in one.fusion.parameters())
    adapters = {id(p) for p in one.adapters.parameters()}
    frozen = [p for p in one.backbone.parameters() if id(p) not in adapters]
    assert frozen
    assert not any(p.requires_grad or p.grad is not None for p in frozen)


def test_the_stages_are_the_paper_s() -> None:
    rows = [(s.tokens, s.lr, s.last_lr, s.iterations) for s in STAGES.values()]
    assert rows == [
        (False, 1e-4, 1e-4, 112_000),
        (False, 1e-4, 1e-4, 112_000),
        (True, 1e-5, 1e-5, 21_000),
        (True, 1e-5, 1e-7, 21_000),
    ]


@pytest.mark.parametrize(
    ("stage", "wanted"), [(1, [1e-4] * 4), (4, [1e-5 * 100 ** (-n / 4) for n in range(4)])]
)
def test_the_rate_runs_from_the_stage_s_first_to_its_last(
    stage: int, wanted: list[float], tmp_path: Path
) -> None:
    assert fit(task(stage=stage), tmp_path, steps=4) == pytest.approx(wanted)


def test_a_later_stage_goes_on_where_the_earlier_ended(tmp_path: Path) -> None:
    first, file = task(stage=1), tmp_path / "first.safetensors"
    stir(first.adapters)
    fit(first, tmp_path)
    first.save_adapter(file)
    later = task(stage=3, start=file)
    tensors, before = later.adapters.state_dict(), first.adapters.state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())
    assert len(tensors) == 3 * len(before)
    assert not any(t.any() for n, t in tensors.items() if n.endswith("/B") and n not in before)
    for name, tensor in first.fusion.state_dict().items():
        assert torch.equal(later.fusion.state_dict()[name], tensor), name
    first.eval()
    later.eval()
    with torch.no_grad():
        assert torch.equal(first(pairs())[1], later(pairs())[1])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"sizes": replace(SIZES, layers=2)}, "has fusion="),
        ({"stage": 1, "start_stage": 3}, "is no earlier stage"),
        ({"rank": 3}, "is no earlier stage"),
    ],
)
def test_what_is_no_earlier_stage_is_refused(
    other: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "first.safetensors"
    task(stage=other.pop("start_stage", 1)).save_adapter(file)
    rank = other.pop("rank", 2)
    settings = {"sizes": SIZES, **other}
    with pytest.raises(AdaptError, match=words):
        AudioVisualDistillation(TinyWhisper(), LoRA(rank=rank), start=file, **settings)


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(AdaptError, match="stage 5 is not allowed: one of 1, 2, 3, 4"):
        task(stage=5)


# What the sets are for


def test_the_level_sets_overlap_and_are_chosen_at_five_decibels() -> None:
    levels = Levels()
    assert levels.ranges() == {"HighNoise": Between(-15, 3), "LowNoise": Between(-3, 30)}
    assert [levels.chosen(snr) for snr in (-15, 0, 4.9, 5.1, 30)] == [
        *["HighNoise"] * 3,
        *["LowNoise"] * 2,
    ]


def test_sets_by_category_hear_one_noise_and_sets_by_level_every_one() -> None:
    scenes = synthetic_scenes(("babble", "music"))
    by_category = category_sets(scenes)
    assert {name: [*one] for name, one in by_category.items()} == {
        "babble": ["babble"],
        "music": ["music"],
    }
    assert by_category["babble"]["babble"].snr_db == Between(-15, 30)
    by_level = level_sets(scenes, Levels(boundary=2, overlap=1))
    assert {name: [*one] for name, one in by_level.items()} == {
        "HighNoise": ["babble", "music"],
        "LowNoise": ["babble", "music"],
    }
    assert by_level["HighNoise"]["music"].snr_db == Between(-15, 3)
    assert by_level["LowNoise"]["music"].snr_db == Between(1, 30)
    assert by_level["LowNoise"]["music"].source == scenes["music"].source


def test_speech_of_a_task_is_its_backbone() -> None:
    one = task()
    assert one.speech.model is one.backbone
    assert type(one.speech) is type(speech_of(one.backbone))
