"""Windows become segments, recordings transcripts, transcripts files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polyadapt.core import LoRA, attach
from polyadapt.core.errors import AdaptError
from polyadapt.speech import transcription
from polyadapt.speech.audio import Recording
from polyadapt.speech.segments import Segment, Span, Transcript, Word, later, spans
from polyadapt.speech.subtitles import FORMATS, srt, vtt
from polyadapt.speech.transcription import Conditions, Manner, transcribe_all
from polyadapt.speech.transcription import transcribe as heard
from polyadapt.tests.scripted_speech import (
    RATE,
    TIME,
    A,
    B,
    at,
    result,
    scripted_speech,
    tone,
)
from polyadapt.tests.speech_models import tiny_speech


@pytest.mark.parametrize(
    ("tokens", "found", "heard_up_to"),
    [
        ([], [], 30.0),
        (A, [(0.0, 30.0, A)], 30.0),
        ([at(0), *A, at(2)], [(0.0, 2.0, A)], 30.0),
        ([at(1), *A, at(2), at(3), *B, at(4)], [(1.0, 2.0, A), (3.0, 4.0, B)], 30.0),
        ([at(0), *A, at(2), at(3), *B], [(0.0, 2.0, A)], 3.0),
        ([at(0), *A, at(2), at(2)], [(0.0, 2.0, A)], 2.0),
        ([at(5), *A], [(5.0, 30.0, A)], 30.0),
        ([at(0), at(0)], [], 30.0),
        ([at(0), *A, 50256], [(0.0, 30.0, A)], 30.0),
    ],
)
def test_tokens_are_cut_at_their_timestamps(
    tokens: list[int], found: list[tuple[float, float, list[int]]], heard_up_to: float
) -> None:
    wanted = [Span(start, end, tuple(text)) for start, end, text in found]
    assert spans(tokens, 50256, TIME, 30.0) == (wanted, heard_up_to)


def test_no_segment_lies_beyond_the_audio_of_a_padded_window() -> None:
    tokens = [at(0), *A, at(20), at(25), *B, at(28)]
    assert spans(tokens, 50256, TIME, 11.0) == ([Span(0.0, 11.0, tuple(A))], 11.0)


def test_a_later_segment_keeps_its_words_in_step() -> None:
    moved = later(Segment(1.0, 2.0, "a", words=(Word("a", 1.0, 1.5, 0.9),)), 30.0)
    assert (moved.start, moved.end, moved.words) == (31.0, 32.0, (Word("a", 31.0, 31.5, 0.9),))
    assert later(Segment(1.0, 2.0, "a"), 1.0).words is None


def test_windows_follow_each_other_where_the_last_timestamp_says() -> None:
    first = result([at(0), *A, at(20), at(20)])
    last = result([at(1), *B, at(9)])
    scripted, speech = scripted_speech({1.0: [first, last]})
    found = heard(speech, tone(1.0, 32.0))
    assert [(s.start, s.end, s.text) for s in found.segments] == [
        (0.0, 20.0, " one two"),
        (21.0, 29.0, " three"),
    ]
    assert (found.text, found.seconds, found.complete) == ("one two three", 32.0, True)
    assert scripted.batches == [(1, 3000), (1, 3000)]


def test_without_timestamps_a_long_recording_is_cut_where_it_is_quiet() -> None:
    audio = tone(1.0, 50.0)
    audio[int(25.0 * RATE) : int(25.4 * RATE)] *= 1e-3
    _, speech = scripted_speech({1.0: [result(A)]})
    found = heard(speech, audio, Conditions(timestamps=False))
    assert len(found.segments) == 2
    assert 25.0 < found.segments[0].end == found.segments[1].start < 25.4
    assert found.segments[1].end == 50.0


def test_a_short_context_is_heard_in_windows_of_its_length() -> None:
    scripted, speech = scripted_speech({1.0: [result(A)]})
    found = heard(speech, tone(1.0, 3.2), Conditions(seconds=1.5, timestamps=False))
    assert {frames for _, frames in scripted.batches} == {150}
    assert found.seconds == 3.2
    assert all(s.end - s.start <= 1.5 for s in found.segments)


@pytest.mark.parametrize(
    "audio", [torch.zeros(RATE * 70), torch.zeros(160), tone(1.0, 0.01), tone(1e-6, 5.0)]
)
def test_silence_and_ten_milliseconds_hold_no_speech_and_are_not_decoded(audio: Tensor) -> None:
    scripted, speech = scripted_speech({1.0: [result(A)]})
    found = heard(speech, audio)
    assert (found.text, found.complete) == ("", True)
    assert found.seconds == len(audio) / RATE
    assert scripted.batches == []


def test_three_hours_are_heard_with_a_window_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    class Long(Recording):
        """Silence, but for a minute after half of the time."""

        def __init__(self, source: Any) -> None:
            super().__init__(torch.empty(0))
            loud, silent = tone(1.0, 10.0), torch.zeros(10 * RATE)
            self._rest = iter(loud if 540 <= i < 546 else silent for i in range(1080))

        def window(self, start: int, length: int) -> Tensor:
            found = super().window(start, length)
            held.append(len(self._held) / RATE)
            return found

    monkeypatch.setattr(transcription, "Recording", Long)
    scripted, speech = scripted_speech({1.0: [result(A)]})
    found = heard(speech, torch.empty(0))
    assert [(s.start, s.text) for s in found.segments] == [
        (5400.0, " one two"),
        (5430.0, " one two"),
    ]
    assert (found.seconds, found.complete) == (10_800.0, True)
    assert len(scripted.batches) == 2
    assert max(held) <= 40


def test_what_the_model_takes_for_silence_has_no_text() -> None:
    _, speech = scripted_speech({1.0: [result(A, no_speech_prob=0.9, avg_logprob=-1.5)]})
    assert heard(speech, tone(1.0, 2.0)).text == ""
    _, speech = scripted_speech({1.0: [result(A, no_speech_prob=0.9, avg_logprob=-0.5)]})
    assert heard(speech, tone(1.0, 2.0)).text == "one two"


@pytest.mark.parametrize("figures", [{"avg_logprob": -1.5}, {"compression_ratio": 2.5}])
def test_a_doubtful_text_is_drawn_again_at_higher_temperatures(figures: dict[str, float]) -> None:
    doubtful, sure = result(A, **figures), result(B)
    scripted, speech = scripted_speech({1.0: [doubtful, doubtful, sure]})
    assert heard(speech, tone(1.0, 2.0), manner=Manner(beam=3)).text == "three"
    assert [(a.temperature, a.beam) for a in scripted.asked] == [(0.0, 3), (0.2, None), (0.4, None)]
    scripted, speech = scripted_speech({1.0: [doubtful]})
    assert heard(speech, tone(1.0, 2.0)).text == "one two"  # the last draw stands
    assert [a.temperature for a in scripted.asked] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_recordings_run_side_by_side_and_each_keeps_its_own_text() -> None:
    scripted, speech = scripted_speech({1.0: [result(A)], 0.01: [result(B)]})
    sources = [tone(1.0, 2.0), tone(0.01, 40.0), tone(1.0, 3.0)]
    grown = dict(transcribe_all(speech, sources, manner=Manner(batch=2)))
    assert [grown[i].text for i in range(3)] == ["one two", "three three", "one two"]
    assert [grown[i].seconds for i in range(3)] == [2.0, 40.0, 3.0]
    assert [size for size, _ in scripted.batches] == [2, 2]


def test_a_chooser_hears_each_window_and_contexts_do_not_share_a_batch() -> None:
    short = Conditions(seconds=1.0, timestamps=False)

    def choose(audio: Tensor) -> Conditions:
        return short if float(audio.abs().max()) < 0.1 else Conditions()

    scripted, speech = scripted_speech({1.0: [result(A)], 0.01: [result(B)]})
    found = dict(transcribe_all(speech, [tone(1.0, 2.0), tone(0.01, 1.0)], choose))
    assert [found[i].text for i in range(2)] == ["one two", "three"]
    assert sorted(scripted.batches) == [(1, 100), (1, 3000)]


def test_a_recording_that_cannot_be_read_leaves_the_others_alone(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("no audio")
    _, speech = scripted_speech({1.0: [result(A)]})
    found = dict(transcribe_all(speech, [tmp_path / "a.wav", tone(1.0, 2.0)]))
    assert "a.wav is not audio" in (found[0].error or "")
    assert (found[0].complete, found[1].complete) == (False, True)
    assert found[1].text == "one two"
    with pytest.raises(AdaptError, match=r"a\.wav is not audio"):
        heard(speech, tmp_path / "a.wav")


def test_sets_act_by_name_and_by_sample() -> None:
    speech = tiny_speech()
    for name, seed in (("loud", 1), ("quiet", 2)):
        made = attach(speech.model, LoRA(rank=2), at="**.attn.value", name=name)
        generator = torch.Generator().manual_seed(seed)
        for parameter in made.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    base = Conditions(seconds=1.0, timestamps=False, longest=4)

    def of(name: str | None) -> Conditions:
        return Conditions(set=name, seconds=1.0, timestamps=False, longest=4)

    def choose(audio: Tensor) -> Conditions:
        return of("loud") if float(audio.abs().max()) > 0.1 else of("quiet")

    loud, quiet = tone(1.0, 1.0), tone(0.01, 1.0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("polyadapt.speech.transcription.WARMER", ())  # random text is doubtful
        mixed = dict(transcribe_all(speech, [loud, quiet], choose))
        alone = [heard(speech, loud, of("loud")), heard(speech, quiet, of("quiet"))]
        frozen = heard(speech, loud, base)
    assert [s.set for t in (mixed[0], mixed[1], frozen) for s in t.segments] == [
        "loud", "quiet", None,
    ]  # fmt: skip
    assert [mixed[i].segments[0].tokens for i in range(2)] == [t.segments[0].tokens for t in alone]
    assert frozen.segments[0].tokens != alone[0].segments[0].tokens


def test_word_times_of_transformers_are_refused_by_name() -> None:
    with pytest.raises(AdaptError, match="word times are found in the openai layout alone"):
        heard(tiny_speech("transformers"), tone(1.0, 1.0), manner=Manner(word_times=True))


SAID = Transcript(
    language="en",
    segments=[Segment(0.0, 1.5, " A <b> & --> c."), Segment(3661.0, 3662.0, " Next.")],
    seconds=4000.0,
    complete=True,
)


def test_srt_numbers_its_cues_and_writes_milliseconds_behind_a_comma() -> None:
    assert srt(SAID) == (
        "1\n00:00:00,000 --> 00:00:01,500\nA <b> & -> c.\n\n"
        "2\n01:01:01,000 --> 01:01:02,000\nNext.\n"
    )


def test_vtt_begins_with_its_name_and_escapes() -> None:
    assert vtt(SAID) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nA &lt;b> &amp; -> c.\n\n"
        "01:01:01.000 --> 01:01:02.000\nNext.\n"
    )


def test_json_says_everything_and_nothing_that_was_not_asked() -> None:
    record = json.loads(FORMATS["json"](SAID))
    assert record["text"] == "A <b> & --> c. Next."
    assert record["complete"] is True
    assert record["segments"][1]["start"] == 3661.0
    assert "words" not in record["segments"][0]


def test_a_silent_transcript_is_valid_in_every_format() -> None:
    silent = Transcript(complete=True)
    assert [FORMATS[kind](silent) for kind in ("txt", "srt", "vtt")] == ["", "", "WEBVTT\n"]
    assert json.loads(FORMATS["json"](silent))["segments"] == []
