"""Transcribing with the video of the mouth: which pictures go where, without video, refusals."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from whisper.decoding import DecodingResult

from polyadapt.core import AdapterSet, sets_of
from polyadapt.core.errors import AdaptError
from polyadapt.speech import ears, transcribe
from polyadapt.speech.audio import log_mel, read_audio
from polyadapt.speech.av_data import FilmedClip
from polyadapt.speech.avsr import fusion_of, load_avsr
from polyadapt.speech.bundle import Bundle, create
from polyadapt.speech.decision import Choice, Scenario
from polyadapt.speech.decoding import Decoding
from polyadapt.speech.ears import Wanted
from polyadapt.speech.fusion import Fusion
from polyadapt.speech.model import Speech
from polyadapt.speech.transcription import Choose, Conditions, Manner, transcribe_all
from polyadapt.tests.avsr_cases import task
from polyadapt.tests.filmed_cases import save_film
from polyadapt.tests.law_table import stir
from polyadapt.tests.scripted_speech import A, result
from polyadapt.tests.speech_bundles import lora
from polyadapt.tests.speech_cases import save_clip
from polyadapt.tests.speech_models import tiny_speech

pytestmark = pytest.mark.slow  # whole runs

SECONDS = 0.6  # the context of the sets here
NAMES = ("babble", "music")
QUICK: dict[str, Any] = {"seconds": SECONDS, "longest": 3, "timestamps": False, "language": "en"}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ears, "built", lambda backbone: tiny_speech())


def save_set(name: str = "babble", seed: int = 1) -> Path:
    """A set with trained-looking numbers of its own."""
    one = task(stage=3, set_name=name, seed=seed, seconds=SECONDS)
    stir(one.adapters, seed)
    one.adapters.extra["backbone"] = {"backbone": "OfflineTinyEn", "layout": "openai"}
    one.save_adapter(f"{name}.safetensors")
    return Path(f"{name}.safetensors")


def film(stem: str, seconds: float = 0.5, seed: int = 0) -> FilmedClip:
    save_film(stem, seconds, seed)
    return FilmedClip.of_files(f"{stem}.wav", f"{stem}.npy")


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What fusion modules get to see, window by window."""
    seen: list[Tensor] = []
    restored = Fusion.restored

    def noting(self: Fusion, mel: Tensor, video: Tensor, frames: Tensor | None = None) -> Tensor:
        seen.append(video)
        return restored(self, mel, video, frames)

    monkeypatch.setattr(Fusion, "restored", noting)
    return seen


@pytest.fixture(autouse=True)
def states(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What decoders get; a random Whisper would talk for long, so they say one thing."""
    noted: list[Tensor] = []

    def decode(self: Speech, found: Tensor, asked: Decoding) -> list[DecodingResult]:
        noted.append(found)
        return [result(A) for _ in found]

    monkeypatch.setattr(Speech, "decode_states", decode)
    return noted


def hear(speech: Speech, clips: list[FilmedClip], conditions: Conditions | Choose) -> None:
    found = dict(transcribe_all(speech, clips, conditions, Manner(batch=2)))
    assert [found[number].text for number in range(len(clips))]
    assert not any(one.error for one in found.values())


# With video


def test_whisper_hears_the_fused_mel_with_the_set(states: list[Tensor]) -> None:
    """The states are those of `AudioVisual`, which a batch beside it does not change."""
    speech = tiny_speech()
    loaded = load_avsr(speech, save_set())
    clips = [film("a"), film("b", 0.4, seed=1)]
    hear(speech, clips, Conditions(set=loaded.adapters.name, fusion=loaded.fusion, **QUICK))
    mel = log_mel([read_audio("a.wav")], seconds=SECONDS)
    wanted = loaded.states(mel, clips[0].see()[None, :12])
    assert torch.allclose(states[0][:1], wanted, atol=1e-5)
    assert not torch.allclose(states[0][:1], loaded.states(mel, None), atol=1e-2)


def test_a_long_recording_is_seen_window_by_window(heard: list[Tensor]) -> None:
    speech = tiny_speech()
    loaded = load_avsr(speech, save_set())
    hear(
        speech,
        [film("a", 2.0)],
        Conditions(set=loaded.adapters.name, fusion=loaded.fusion, **QUICK),
    )
    counted = [video[0, :, 0].tolist() for video in heard]  # the features count the pictures
    assert len(counted) >= 4
    for row in counted:
        assert row == [row[0] + n for n in range(len(row))]
        assert len(row) <= 15
    assert counted[0][0] == 0
    assert all(abs(b[0] - a[-1] - 1) <= 1 for a, b in pairwise(counted))
    assert counted[-1][-1] in (48, 49)


def test_the_verb_takes_a_video_for_each_file(
    capsys: pytest.CaptureFixture[str], heard: list[Tensor]
) -> None:
    save_set()
    for index in range(2):
        save_film(str(index), 0.5, index)
    words = ["0.wav", "1.wav", "--set", "babble.safetensors"]
    assert transcribe.main([*words, "--video", "0.npy", "1.npy"]) == 0
    first = {round(float(video[0, 0, 0]), 1) for video in heard}
    assert first == {0.0, 0.1}  # each file its own
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == words[:2]


# Without video


def test_without_video_a_set_hears_as_the_plain_whisper_bit_for_bit(
    states: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    save_set()
    save_clip("a.wav", 1.0)
    said = []
    for words in (["--set", "babble.safetensors"], ["--model", "tiny.en"]):
        assert transcribe.main(["a.wav", *words, "--format", "json"]) == 0
        printed = capsys.readouterr()
        said.append(printed.out)
        assert ("without --video the plain Whisper hears" in printed.err) is ("--set" in words)
    assert said[0] == said[1]
    with_set, plain = states
    assert with_set.shape == (1, 1500, 64)
    assert torch.equal(with_set, plain)


# Bundles


@pytest.fixture
def bundle() -> Path:
    speech = tiny_speech()
    plain = lora(speech, "plain")
    about = {"backbone": {"backbone": "OfflineTinyEn", "layout": "openai"}, "language": "en"}
    plain.extra |= {**about, "timestamps": False, "seconds": SECONDS}
    sets: dict[str, Path | AdapterSet] = {
        name: save_set(name, n) for n, name in enumerate(NAMES, 1)
    }
    sets["plain"] = plain
    create("sets", sets, {name: Scenario(name) for name in sets})
    return Path("sets")


def test_a_set_of_a_bundle_is_taken_by_name_with_its_fusion_module(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speech, told = ears.ears(Wanted(sets=bundle, select="music", filmed=True))
    assert isinstance(told, Conditions)
    assert told.set == "music"
    assert told.fusion is not None
    wanted = fusion_of(sets_of(speech.model)["music"]).state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in told.fusion.state_dict().items())
    assert ears.ears(Wanted(sets=bundle, select="music"))[1] == Conditions()
    assert "music.safetensors is an audio-visual set" in capsys.readouterr().err


def test_sets_are_chosen_by_the_noise_and_see_with_their_own_module(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, heard: list[Tensor]
) -> None:
    monkeypatch.setattr(Bundle, "_hear", lambda self: "")
    names = {0.5: "babble", 0.48: "music", 0.44: "plain", 0.4: None}
    monkeypatch.setattr(
        Bundle, "choose", lambda self, sound: Choice(names[len(sound) / 16_000], "as the test says")
    )
    speech, told = ears.ears(Wanted(sets=bundle, filmed=True))
    assert callable(told)
    found = {name: told(torch.zeros(round(16_000 * s))) for s, name in names.items()}
    assert {name: one.set for name, one in found.items()} == {n: n for n in names.values()}
    assert [name for name, one in found.items() if one.fusion] == ["babble", "music"]
    clips = [film(f"clip{n}", seconds, n) for n, seconds in enumerate(names)]
    hear(speech, clips, told)
    assert sorted(round(float(video[0, 0, 0]), 1) for video in heard) == [0.0, 0.1]


# Refusals, one line each


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.wav", "--video", "a.npy", "b.npy"], "--video: 2 videos for 1 files; one for each"),
        (["a.wav", "--video", "a.npy"], "--video needs an audio-visual set: give --set FILE"),
        (["a.wav", "--video", "a.npy", "--set", "plain.st"], "plain.st holds no audio-visual set"),
    ],
)
def test_videos_that_belong_to_nothing_are_refused(words: list[str], said: str) -> None:
    made = lora(tiny_speech(), "plain")
    about = {"backbone": {"backbone": "OfflineTinyEn", "layout": "openai"}, "language": "en"}
    made.extra |= {**about, "timestamps": False, "seconds": SECONDS}
    made.save("plain.st")
    with pytest.raises(AdaptError, match=said) as refused:
        transcribe.main(words)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("video", "said"),
    [
        (None, "a.npy: no such file of mouth crops"),
        (np.zeros((30, 6), np.float32), "a.wav: the mel's 50 frames are 12 video frames, but"),
        (np.zeros((12, 5), np.float32), r"the video of a.wav is \[12, 5\], the set takes \[f, 6\]"),
        (np.zeros((12, 90, 90), np.uint8), r"is \[12, 90, 90\], the set takes \[f, 6\]"),
        (np.full((12, 6), np.nan), "features are finite floats"),
    ],
)
def test_a_film_that_cannot_be_used_is_one_line_and_the_others_are_heard(
    video: np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_set()
    for stem in ("a", "b"):
        save_film(stem, 0.5)
    Path("a.npy").unlink()
    if video is not None:
        np.save("a.npy", video)
    words = ["a.wav", "b.wav", "--set", "babble.safetensors", "--video", "a.npy", "b.npy"]
    assert transcribe.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("b.wav\t")
    (line,) = printed.err.splitlines()
    assert re.search(said, line)
