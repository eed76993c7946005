"""Bundles: sets, labels and selector in one folder act as they should."""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polyadapt.core import AdaptError, activate, sets_of, switch
from polyadapt.speech.audio import SAMPLE_RATE, log_mel
from polyadapt.speech.bundle import Bundle, create
from polyadapt.speech.bundle_record import Hearing
from polyadapt.speech.decision import NONE, Costs, Decision, Scenario
from polyadapt.speech.model import Speech
from polyadapt.speech.noise import Active
from polyadapt.speech.scenes import seeded
from polyadapt.tests.speech_bundles import (
    CLASSES,
    COSTS,
    GAIN,
    LABELS,
    WER,
    bundle,
    decision,
    lora,
    noisy,
    trained_selector,
)
from polyadapt.tests.speech_models import tiny_speech


@torch.no_grad()
def logits(speech: Speech, name: str | None = None) -> Tensor:
    mel = torch.randn(1, 80, 60, generator=seeded("mel"))
    with activate(speech.model, name) if name else nullcontext():
        return speech.logits(torch.tensor([[50257, 50362]]), speech.encode(mel))


def test_the_sets_of_a_bundle_act_as_they_did_when_they_were_put_in(tmp_path: Path) -> None:
    trained = tiny_speech()
    sets = {name: lora(trained, name, seed) for seed, name in enumerate(LABELS)}
    switch(trained.model, None)
    create(tmp_path / "b", sets, LABELS)
    here = tiny_speech()
    plain = logits(here)
    opened = Bundle.open(tmp_path / "b")
    assert opened.load_onto(here) == list(LABELS)
    assert opened.labels == LABELS
    assert torch.equal(logits(here), plain)  # nothing acts before it is chosen
    for name in LABELS:
        assert torch.equal(logits(here, name), logits(trained, name))
        assert not torch.allclose(logits(here, name), plain)


def test_switching_there_and_back_restores_a_sets_outputs_bit_for_bit(tmp_path: Path) -> None:
    speech = tiny_speech()
    bundle(tmp_path / "b").load_onto(speech)
    before = logits(speech, "hiss")
    assert not torch.equal(logits(speech, "voice"), before)
    assert torch.equal(logits(speech, "hiss"), before)


@pytest.mark.slow  # transformers takes its time to import
def test_a_bundle_loads_onto_the_other_whisper_class(tmp_path: Path) -> None:
    bundle(tmp_path / "b")
    one, other = tiny_speech(), tiny_speech("transformers")
    for speech in (one, other):
        assert Bundle.open(tmp_path / "b").load_onto(speech.model) == list(LABELS)
    for name in LABELS:
        torch.testing.assert_close(logits(one, name), logits(other, name), atol=1e-4, rtol=1e-4)


def test_the_selector_chooses_by_what_it_hears(tmp_path: Path) -> None:
    opened = bundle(tmp_path / "b", trained_selector())
    for kind, name in (("white", "hiss"), ("side", "voice")):
        choice = opened.choose(noisy(kind))
        assert choice.name == name
        assert choice.scenario == kind
        assert choice.snr_db is not None
        assert set(choice.expected) == {*LABELS, NONE}
        assert sum(choice.probabilities.values()) == pytest.approx(1)
    again = Bundle.open(tmp_path / "b")
    assert again.choose(noisy("white")) == opened.choose(noisy("white"))
    assert again.decision == decision()
    assert again.decision is not None
    assert again.decision.gain == GAIN


def test_samples_and_their_log_mel_are_chosen_for_alike(tmp_path: Path) -> None:
    opened, clip = bundle(tmp_path / "b", trained_selector()), noisy("side")
    assert opened.choose(log_mel([clip], seconds=1.0)[0]) == opened.choose(clip)


def test_a_long_recording_is_heard_in_windows(tmp_path: Path) -> None:
    opened = bundle(tmp_path / "b", trained_selector())
    recording = noisy("white").repeat(70)
    assert opened.choose(recording).name == "hiss"


@pytest.mark.parametrize("clip", [torch.zeros(SAMPLE_RATE), torch.ones(160) / 9])
def test_silence_and_a_hundredth_of_a_second_fall_back(tmp_path: Path, clip: Tensor) -> None:
    choice = bundle(tmp_path / "b", trained_selector()).choose(clip)
    assert choice.name == "general"
    assert choice.why == "nothing to hear: silence, or less than 0.1 s"


def test_an_unsure_selector_takes_the_general_set(tmp_path: Path) -> None:
    opened = bundle(tmp_path / "b")
    opened.equip(trained_selector(), decision(threshold=1.0), Hearing(temperature=8.0))
    choice = opened.choose(noisy("white"))
    assert choice.name == "general"
    assert choice.why.startswith("unsure: the likeliest class has 0.")


def test_a_set_added_later_is_chosen_by_name_until_the_selector_knows_it(tmp_path: Path) -> None:
    opened = bundle(tmp_path / "b", trained_selector())
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").glob("*.safetensors")}
    lora(tiny_speech(), "rain", 5).save(tmp_path / "rain.safetensors")
    opened.add(tmp_path / "rain.safetensors", Scenario("natural", high=5))
    for holder in (opened, Bundle.open(tmp_path / "b")):
        assert holder.names == [*LABELS, "rain"]
        with pytest.raises(AdaptError, match="its selector and cost matrix do not cover rain"):
            holder.choose(noisy("white"))
    for name, content in before.items():
        assert (tmp_path / "b" / name).read_bytes() == content
    speech = tiny_speech()
    assert "rain" in opened.load_onto(speech)
    assert not torch.equal(logits(speech, "rain"), logits(speech))
    wider = Costs((*COSTS.sets, "rain"), COSTS.scenarios, (*COSTS.wer, (5.0, 99.0)), "general")
    opened.equip(trained_selector(), Decision(wider, CLASSES))
    assert Bundle.open(tmp_path / "b").choose(noisy("white")).name == "rain"


def test_without_a_selector_sets_are_chosen_by_name(tmp_path: Path) -> None:
    opened = bundle(tmp_path / "b")
    with pytest.raises(AdaptError, match="the bundle has no selector; choose by name: hiss, voice"):
        opened.choose(noisy("white"))


def test_what_a_set_carries_stays_with_it(tmp_path: Path) -> None:
    """Batch-norm buffers of a fusion module travel in the head."""
    speech = tiny_speech()
    made = lora(speech, "av")
    made.head = {"fusion.norm.running_mean": torch.arange(4.0), "fusion.count": torch.tensor(3)}
    create(tmp_path / "b", {"av": made}, {"av": Scenario("babble")})
    here = tiny_speech()
    Bundle.open(tmp_path / "b").load_onto(here)
    found = sets_of(here.model)["av"]
    assert torch.equal(found.head["fusion.norm.running_mean"], torch.arange(4.0))
    assert int(found.head["fusion.count"]) == 3
    assert found.extra["label"] == {"category": "av"}


def test_settings_of_the_hearing_survive(tmp_path: Path) -> None:
    speech = tiny_speech()
    hearing = Hearing(Active(40.0), 1.25, 80, 11)
    sets = {name: lora(speech, name) for name in LABELS}
    create(tmp_path / "b", sets, LABELS, trained_selector(), decision(), hearing)
    assert Bundle.open(tmp_path / "b").record.hearing == hearing
    value = json.loads((tmp_path / "b" / "bundle.json").read_text())
    assert value["hearing"]["snr_convention"] == "active-40"
    assert value["decision"]["wer"] == [list(row) for row in WER.values()]


def test_opening_a_sound_bundle_warns_of_nothing(tmp_path: Path) -> None:
    bundle(tmp_path / "b", trained_selector())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Bundle.open(tmp_path / "b").load_onto(tiny_speech())
