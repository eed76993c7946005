"""The transcribe verb with trained weights on recorded speech."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from polyadapt.core import LoRA, attach
from polyadapt.speech import transcribe
from polyadapt.speech.adapters import load_set
from polyadapt.speech.audio import read_audio
from polyadapt.speech.backbones import OfflineTinyEn
from polyadapt.speech.ears import Wanted, ears
from polyadapt.speech.model import Speech, speech_of
from polyadapt.speech.names import LAYOUTS, Layout, sites_for
from polyadapt.speech.transcription import Conditions, Manner
from polyadapt.speech.transcription import transcribe as heard

pytestmark = pytest.mark.slow  # 37 million parameters

SAID = (
    "and so my fellow americans ask not what your country can do for you ask what you can do for"
    " your country"
)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def test_words_have_times_in_order_and_the_files_are_valid(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(shared_data / "jfk.flac"), "--model", "offline", "--word-times"]
    argv += ["--format", "txt,srt,vtt,json", "--out", str(tmp_path)]
    assert transcribe.main(argv) == 0
    assert _plain((tmp_path / "jfk.txt").read_text()) == SAID
    record = json.loads((tmp_path / "jfk.json").read_text())
    assert (_plain(record["text"]), record["seconds"]) == (SAID, 11.0)
    words = [word for segment in record["segments"] for word in segment["words"]]
    assert _plain("".join(word["text"] for word in words)) == SAID
    assert all(0 <= word["start"] <= word["end"] <= 11.0 for word in words)
    assert all(one["end"] <= other["start"] + 1e-6 for one, other in pairwise(words))
    by_text = {_plain(word["text"]): word for word in words}
    assert 1.2 < by_text["fellow"]["start"] < 1.8  # listened to
    times = r"\d\d:\d\d:\d\d[,.]\d{3} --> \d\d:\d\d:\d\d[,.]\d{3}"
    for kind in ("srt", "vtt"):
        text = (tmp_path / f"jfk.{kind}").read_text()
        assert len(re.findall(times, text)) == len(record["segments"])


def _speech(layout: Layout) -> Speech:
    return speech_of(OfflineTinyEn(layout=layout).build())


def test_a_set_is_heard_by_both_layouts_with_beam_and_greedily(
    shared_data: Path, tmp_path: Path
) -> None:
    clip = read_audio(shared_data / "jfk.flac")
    one, other = _speech("openai"), _speech("transformers")
    made = attach(one.model, LoRA(rank=2), at=sites_for("openai"), name="a")
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) / 100)
    made.save(tmp_path / "a.safetensors")
    load_set(other, tmp_path / "a.safetensors")
    assert (one.layout, other.layout) == LAYOUTS
    for manner in (Manner(), Manner(beam=2)):
        told = Conditions(set="a", timestamps=False)
        first, second = (heard(speech, clip, told, manner) for speech in (one, other))
        assert first.segments[0].tokens == second.segments[0].tokens
        assert _plain(first.text) == SAID


def test_a_set_knows_its_whisper_and_its_context(tmp_path: Path) -> None:
    speech = _speech("openai")
    made = attach(speech.model, LoRA(rank=2), at=sites_for("openai"), name="digits")
    made.extra = {
        "task": "speech-recognition",
        "backbone": OfflineTinyEn().to_json(),
        "seconds": 1.5,
        "language": "en",
        "timestamps": False,
        "longest": 10,
    }
    made.save(tmp_path / "digits.safetensors")
    found, told = ears(Wanted(set=tmp_path / "digits.safetensors"))
    assert told == Conditions(
        set="digits", seconds=1.5, language="en", timestamps=False, longest=10
    )
    assert found.layout == "openai"
    found, told = ears(
        Wanted(set=tmp_path / "digits.safetensors", model="offline:transformers", timestamps=True)
    )
    assert (found.layout, told) == (  # the same weights in the other class
        "transformers",
        Conditions(set="digits", seconds=1.5, language="en", timestamps=True, longest=10),
    )
