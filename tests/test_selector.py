"""The selector: its sizes, what it may not depend on, and that it learns to hear."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import soundfile
import soxr
import torch
from torch import Tensor

from polyadapt.core import AdaptError
from polyadapt.core.container import write
from polyadapt.core.errors import StoreError
from polyadapt.speech.audio import SAMPLE_RATE, log_mel
from polyadapt.speech.decision import NONE, Costs, Decision, Scenario, predicted
from polyadapt.speech.scenes import Between, seeded, split, synthetic_scenes
from polyadapt.speech.selector import Selector, read_selector, save_selector
from polyadapt.speech.selector_training import (
    Measured,
    examples,
    fitted_temperature,
    measure,
    train,
)
from polyadapt.speech.synthetic import speech_like

pytestmark = pytest.mark.slow

CLASSES = ("babble", "music", "natural", "side")


def count(selector: Selector) -> int:
    return sum(p.numel() for p in selector.parameters())


def woken(selector: Selector) -> Selector:
    """Batch norms that have seen something."""
    with torch.no_grad():
        for _ in range(3):
            selector.train()(torch.randn(4, 80, 60))
    return selector.eval()


def test_the_small_network_has_its_published_size() -> None:
    assert count(Selector(CLASSES)) == 64_885
    assert count(Selector(CLASSES)) - count(Selector(CLASSES[:3])) == 65  # one class: 64 + 1


@pytest.mark.parametrize(
    ("blocks", "category", "level"), [(10, 709_380, 709_185), (5, 338_820, 338_625)]
)
def test_the_residual_networks_have_the_sizes_of_the_paper(
    blocks: int, category: int, level: int
) -> None:
    assert count(Selector(CLASSES, snr=False, residual_blocks=blocks)) == category
    assert count(Selector((), residual_blocks=blocks)) == level


@pytest.mark.parametrize("frames", [1, 100, 3000])
@pytest.mark.parametrize("blocks", [0, 1])
def test_any_number_of_frames_is_heard(frames: int, blocks: int) -> None:
    found = Selector(CLASSES, residual_blocks=blocks).eval()(torch.zeros(1, 80, frames))
    assert found.logits.shape == (1, 4)
    assert found.snr_db.shape == (1,)


def test_a_selector_with_one_head_says_nothing_for_the_other() -> None:
    mel = torch.randn(2, 80, 50)
    assert Selector(()).eval()(mel).logits.shape == (2, 0)
    assert Selector(CLASSES, snr=False).eval()(mel).snr_db.isnan().all()


def test_the_order_of_a_batch_does_not_matter_and_eval_mode_is_deterministic() -> None:
    selector, mel = woken(Selector(CLASSES)), torch.randn(5, 80, 120)
    order = torch.tensor([3, 1, 4, 0, 2])
    once, again, moved = selector(mel), selector(mel), selector(mel[order])
    assert torch.equal(once.logits, again.logits)
    for here, there in zip(once, moved, strict=True):
        torch.testing.assert_close(here[order], there, atol=1e-5, rtol=0)


@pytest.mark.parametrize("blocks", [0, 2])
def test_what_pads_a_clip_is_not_heard(blocks: int) -> None:
    selector = woken(Selector(CLASSES, residual_blocks=blocks))
    clips = [torch.randn(80, frames) for frames in (37, 120, 81)]
    padded = torch.full((3, 80, 120), -9.0)
    for row, clip in zip(padded, clips, strict=True):
        row[:, : clip.shape[1]] = clip
    together = selector(padded, torch.tensor([37, 120, 81]))
    for i, clip in enumerate(clips):
        alone = selector(clip[None])
        torch.testing.assert_close(together.logits[i], alone.logits[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.snr_db[i], alone.snr_db[0], atol=1e-5, rtol=0)


def test_loudness_does_not_change_what_is_heard() -> None:
    selector, clip = woken(Selector(CLASSES)), torch.randn(16_000) / 10
    quiet, loud = (selector(log_mel([g * clip], seconds=1.0)).logits for g in (0.1, 1.0))
    torch.testing.assert_close(quiet, loud, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_trained_on_generated_noise_it_names_category_and_snr_and_chooses_almost_as_an_oracle() -> (
    None
):
    clips = [speech_like(32_000, seeded("speaker", i)) / 10 for i in range(40)]
    scenes = synthetic_scenes(CLASSES, Between(-10, 10))
    data = examples(scenes, clips[:30], 400, seconds=1.5)
    selector = Selector(CLASSES)
    losses = train(selector, data, steps=150)
    held_out = examples(scenes, clips[30:], 100, seconds=1.5, seed=1)
    found = measure(selector, held_out)
    assert losses[-1] < 0.2 * losses[0]
    assert found.accuracy > 0.9
    assert found.snr_error < 4
    assert not selector.training

    decision = Decision(TABLE, CLASSES)
    with torch.no_grad():
        chances = (selector(held_out.mel, held_out.frames).logits / found.temperature).softmax(1)
    choices = [[0] * len(TABLE.sets) for _ in CLASSES]
    for category, p in zip(held_out.category.tolist(), chances.tolist(), strict=True):
        choices[category][TABLE.sets.index(decision.choose(p).name or NONE)] += 1
    oracle = sum(min(column) for column in zip(*TABLE.wer, strict=True)) / 4
    fixed = [sum(row) / 4 for row in TABLE.wer]
    assert oracle <= sum(predicted(TABLE, choices)) / 4 <= min(fixed[1:]) <= max(fixed)


# Rows: the base, and the sets of the paper's table I at -10 dB (babble, music, noise, side).
TABLE = Costs(
    (NONE, *CLASSES),
    tuple(map(Scenario, CLASSES)),
    (
        (200.0, 200.0, 200.0, 200.0),
        (51.5, 48.5, 36.1, 122.7),
        (77.1, 11.4, 19.2, 87.4),
        (80.0, 21.9, 17.3, 124.2),
        (90.8, 22.1, 26.6, 8.7),
    ),
)


@pytest.mark.slow
def test_real_speakers_that_it_never_heard_are_no_obstacle(shared_data: Path) -> None:
    with zipfile.ZipFile(shared_data / "fsdd_small.zip") as archive:
        clips: dict[str, list[Tensor]] = {}
        for name in sorted(n for n in archive.namelist() if n.endswith(("_0.wav", "_1.wav"))):
            samples, rate = soundfile.read(io.BytesIO(archive.read(name)), dtype="float32")
            doubled = torch.from_numpy(soxr.resample(samples, rate, SAMPLE_RATE))
            clips.setdefault(name.split("_")[1], []).append(doubled)
    heard, new = ([c for name in part for c in clips[name]] for part in split(clips, (4, 2)))
    scenes = synthetic_scenes(("babble", "music", "stationary"), Between(-5, 10))
    selector = Selector(tuple(scenes))
    train(selector, examples(scenes, heard, 300, seconds=1.0), steps=120)
    assert measure(selector, examples(scenes, new, 90, seconds=1.0, seed=1)).accuracy > 0.85


def test_a_few_steps_already_tell_voices_from_white_noise() -> None:
    clips = [speech_like(16_000, seeded(i)) / 10 for i in range(12)]
    scenes = synthetic_scenes(("white", "side"), (0.0,))
    data = examples(scenes, clips[:8], 48, seconds=1.0)
    assert data.category.tolist() == [0, 1] * 24
    assert data.snr_db.tolist() == [0.0] * 48
    assert data.frames.tolist() == [100] * 48
    selector = Selector(("white", "side"))
    train(selector, data, steps=70, batch_size=8)
    found = measure(selector, examples(scenes, clips[8:], 24, seconds=1.0, seed=1))
    assert found.accuracy >= 0.9
    assert found.confusion.sum() == 24
    assert found.snr_sigma >= found.snr_error


def test_training_is_the_same_every_time() -> None:
    clips = [speech_like(16_000, seeded(i)) / 10 for i in range(4)]
    data = examples(synthetic_scenes(("white", "pink"), clean=True), clips, 9, seconds=1.0)
    assert data.snr_db[2::3].tolist() == [30.0] * 3  # clean speech: the end of the range
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        selector = Selector(("white", "pink", "clean"))
        train(selector, data, steps=3, batch_size=4)
        weights.append(torch.cat([p.detach().flatten() for p in selector.parameters()]))
    assert torch.equal(weights[0], weights[1])


@pytest.mark.parametrize(("classes", "snr"), [(CLASSES, False), ((), True)])
def test_either_head_is_trained_alone(classes: tuple[str, ...], snr: bool) -> None:
    clips = [speech_like(16_000, seeded(0)) / 10]
    data = examples(synthetic_scenes(CLASSES), clips, 8, seconds=1.0)
    selector = Selector(classes, snr)
    assert train(selector, data, steps=2, batch_size=4)[0] > 0
    assert measure(selector, data).temperature >= 1


def test_accuracy_is_the_share_on_the_diagonal() -> None:
    assert Measured(torch.tensor([[3, 1], [0, 4]]), 0.0, 0.0, 1.0).accuracy == 7 / 8


def test_the_temperature_makes_an_overconfident_network_as_sure_as_it_may_be() -> None:
    """Three of four right: sigmoid(z / t) = 3/4 at z / t = ln 3, so t = 4.4 / 1.0986 = 4.0."""
    logits = torch.tensor([[4.4, 0.0]]).repeat(4, 1)
    assert fitted_temperature(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(4.0)
    assert fitted_temperature(logits, torch.zeros(4, dtype=torch.int64)) == 1


def test_no_clips_and_odd_selectors_are_refused() -> None:
    with pytest.raises(AdaptError, match="0 clips and 1 scenes give no examples"):
        examples(synthetic_scenes(("white",)), [], 3)
    for classes, snr in (((), False), (("a", "a"), True)):
        with pytest.raises(AdaptError, match="is not allowed: names that differ, or an SNR head"):
            Selector(classes, snr)


def test_a_saved_selector_says_the_same(tmp_path: Path) -> None:
    selector, mel = woken(Selector(CLASSES)), torch.randn(2, 80, 70)
    save_selector(selector, tmp_path / "s.safetensors", {"labels": "abc"})
    again, about = read_selector(tmp_path / "s.safetensors")
    assert about == {"labels": "abc"}
    assert again.classes == CLASSES
    assert torch.equal(again(mel).logits, selector(mel).logits)


def test_a_file_that_is_no_selector_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    write(file, {"kind": "set"}, {})
    with pytest.raises(StoreError, match="holds no selector"):
        read_selector(file)
    write(file, {"kind": "selector", "classes": ["a"], "snr": True}, {})
    with pytest.raises(StoreError, match="lacks or misstates 'residual_blocks'"):
        read_selector(file)
    selector = Selector(CLASSES)
    save_selector(selector, file, {})
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(StoreError, match="truncated or damaged"):
        read_selector(file)
    write(file, {"kind": "selector", **Selector(CLASSES[:2]).record(), "about": {}}, {})
    with pytest.raises(StoreError, match="is missing"):
        read_selector(file)
