"""Sets of a bundle, chosen for every window or by name, in transcription."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyadapt.core import sets_of
from polyadapt.core.errors import AdaptError
from polyadapt.speech import ears
from polyadapt.speech.backbones import OfflineTinyEn
from polyadapt.speech.bundle import Bundle, create
from polyadapt.speech.decision import Choice
from polyadapt.speech.ears import Wanted
from polyadapt.speech.transcription import Conditions
from polyadapt.tests.speech_bundles import LABELS, lora
from polyadapt.tests.speech_models import tiny_speech

pytestmark = pytest.mark.slow


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of three sets with contexts of their own, on the tiny Whisper."""
    speech = tiny_speech()
    made = {name: lora(speech, name) for name in LABELS}
    for name, one in made.items():
        about = {"backbone": OfflineTinyEn().to_json(), "language": "en", "timestamps": False}
        one.extra |= {**about, "seconds": {"hiss": 1.0, "voice": 2.0}.get(name, 30.0)}
    create(tmp_path / "sets", made, LABELS)
    monkeypatch.setattr(ears, "built", lambda backbone: tiny_speech())
    return tmp_path / "sets"


def test_a_set_of_a_bundle_is_taken_by_name_with_its_context(bundle: Path) -> None:
    speech, told = ears.ears(Wanted(sets=bundle, select="voice"))
    assert list(sets_of(speech.model)) == ["voice"]
    assert told == Conditions(set="voice", seconds=2.0, language="en", timestamps=False)


def test_none_is_the_frozen_whisper(bundle: Path) -> None:
    speech, told = ears.ears(Wanted(sets=bundle, select="none", language="en"))
    assert sets_of(speech.model) == {}
    assert told == Conditions(language="en")


def test_an_unknown_set_and_a_bundle_that_cannot_choose_are_refused(bundle: Path) -> None:
    with pytest.raises(AdaptError, match="has no set 'rain'; it has hiss, voice, general"):
        ears.ears(Wanted(sets=bundle, select="rain"))
    with pytest.raises(AdaptError, match=r"cannot be chosen automatically: .*with --select"):
        ears.ears(Wanted(sets=bundle))


def test_every_window_is_heard_by_the_set_that_is_chosen_for_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def choose(self: Bundle, heard: torch.Tensor) -> Choice:
        return Choice("hiss" if float(heard.abs().max()) > 0.5 else None, "as the test says")

    monkeypatch.setattr(Bundle, "_hear", lambda self: "")
    monkeypatch.setattr(Bundle, "choose", choose)
    (bundle / "voice.safetensors").write_bytes(b"damaged")
    speech, told = ears.ears(Wanted(sets=bundle))
    assert "set 'voice' is left out" in capsys.readouterr().err
    assert sorted(sets_of(speech.model)) == ["general", "hiss"]
    assert callable(told)
    assert told(torch.ones(100)) == Conditions(
        set="hiss", seconds=1.0, language="en", timestamps=False
    )
    assert told(torch.zeros(100)) == Conditions()
