"""Windows become segments, recordings transcripts, transcripts files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn
from whisper.decoding import DecodingResult
from whisper.model import ModelDimensions

from polyadapt.core import LoRA, attach
from polyadapt.core.errors import AdaptError
from polyadapt.speech import ears, transcribe
from polyadapt.speech.backbones import OfflineTinyEn, OpenAIWhisper, TransformersWhisper
from polyadapt.speech.decoding import Decoding
from polyadapt.speech.model import Speech
from polyadapt.speech.segments import Segment, Span, Transcript, Word, later, spans
from polyadapt.speech.subtitles import FORMATS, srt, vtt
from polyadapt.speech.tokens import Tokens
from polyadapt.speech.transcription import (
    Conditions,
    Manner,
    transcribe_all,
)
from polyadapt.speech.transcription import transcribe as heard
from polyadapt.tests.speech_models import ENGLISH, tiny_speech

RATE, TIME = 16_000, 50363  # the token of <|0.00|>
TOKENS = Tokens(ENGLISH)


def _words(text: str) -> list[int]:
    return TOKENS.pair(text)[0][2:]


def _at(seconds: float) -> int:
    return TIME + round(seconds / 0.02)


def _result(tokens: Sequence[int], **figures: float) -> DecodingResult:
    known = {"avg_logprob": -0.2, "no_speech_prob": 0.1, "compression_ratio": 1.0, **figures}
    return DecodingResult(
        audio_features=torch.zeros(1), language="en", tokens=list(tokens), **known
    )


@dataclass
class Scripted:
    """Stands where a `Speech` does and says what a script says of a window's loudness.

    Windows are constant signals; the mean power in the first frame tells one from another.
    """

    script: dict[float, list[DecodingResult]]
    dims: ModelDimensions = field(
        default_factory=lambda: ModelDimensions(80, 1500, 4, 1, 1, ENGLISH, 448, 4, 1, 1)
    )
    multilingual: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    model: nn.Module = field(default_factory=nn.Module)
    batches: list[tuple[int, int]] = field(default_factory=list)
    asked: list[Decoding] = field(default_factory=list)

    def encode(self, mel: Tensor) -> Tensor:
        self.batches.append((len(mel), mel.shape[2]))
        return mel.mean(dim=1)[:, :4]  # [b, 4]

    def decode_states(self, states: Tensor, asked: Decoding) -> list[DecodingResult]:
        self.asked.append(asked)
        return [self._said(float(state[2])) for state in states]

    def _said(self, found: float) -> DecodingResult:
        nearest = min(self.script, key=lambda level: abs(_level(level) - found))
        said = self.script[nearest]
        return said.pop(0) if len(said) > 1 else said[0]


def _tone(level: float, seconds: float) -> Tensor:
    """White noise of one seed, as loud as `level` says."""
    noise = torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(0))
    return level * noise / 4


def _level(level: float) -> float:
    from polyadapt.speech.audio import log_mel

    return float(log_mel([_tone(level, 1.0)], seconds=1.0)[0].mean(dim=0)[2])


def _scripted(script: dict[float, list[DecodingResult]]) -> tuple[Scripted, Speech]:
    made = Scripted(script)
    return made, cast(Speech, made)


A, B = _words("one two"), _words("three")


@pytest.mark.parametrize(
    ("tokens", "found", "heard_up_to"),
    [
        ([], [], 30.0),
        (A, [(0.0, 30.0, A)], 30.0),
        ([_at(0), *A, _at(2)], [(0.0, 2.0, A)], 30.0),
        ([_at(1), *A, _at(2), _at(3), *B, _at(4)], [(1.0, 2.0, A), (3.0, 4.0, B)], 30.0),
        ([_at(0), *A, _at(2), _at(3), *B], [(0.0, 2.0, A)], 3.0),
        ([_at(0), *A, _at(2), _at(2)], [(0.0, 2.0, A)], 2.0),
        ([_at(5), *A], [(5.0, 30.0, A)], 30.0),
        ([_at(0), _at(0)], [], 30.0),
        ([_at(0), *A, 50256], [(0.0, 30.0, A)], 30.0),
    ],
)
def test_tokens_are_cut_at_their_timestamps(
    tokens: list[int], found: list[tuple[float, float, list[int]]], heard_up_to: float
) -> None:
    wanted = [Span(start, end, tuple(text)) for start, end, text in found]
    assert spans(tokens, 50256, TIME, 30.0) == (wanted, heard_up_to)


def test_no_segment_lies_beyond_the_audio_of_a_padded_window() -> None:
    tokens = [_at(0), *A, _at(20), _at(25), *B, _at(28)]
    assert spans(tokens, 50256, TIME, 11.0) == ([Span(0.0, 11.0, tuple(A))], 11.0)


def test_a_later_segment_keeps_its_words_in_step() -> None:
    moved = later(Segment(1.0, 2.0, "a", words=(Word("a", 1.0, 1.5, 0.9),)), 30.0)
    assert (moved.start, moved.end, moved.words) == (31.0, 32.0, (Word("a", 31.0, 31.5, 0.9),))
    assert later(Segment(1.0, 2.0, "a"), 1.0).words is None


def test_windows_follow_each_other_where_the_last_timestamp_says() -> None:
    first = _result([_at(0), *A, _at(20), _at(20)])
    last = _result([_at(1), *B, _at(9)])
    scripted, speech = _scripted({1.0: [first, last]})
    found = heard(speech, _tone(1.0, 32.0))
    assert [(s.start, s.end, s.text) for s in found.segments] == [
        (0.0, 20.0, " one two"),
        (21.0, 29.0, " three"),
    ]
    assert (found.text, found.seconds, found.complete) == ("one two three", 32.0, True)
    assert scripted.batches == [(1, 3000), (1, 3000)]


def test_without_timestamps_a_long_recording_is_cut_where_it_is_quiet() -> None:
    audio = _tone(1.0, 50.0)
    audio[int(25.0 * RATE) : int(25.4 * RATE)] *= 1e-3
    _, speech = _scripted({1.0: [_result(A)]})
    found = heard(speech, audio, Conditions(timestamps=False))
    assert len(found.segments) == 2
    assert 25.0 < found.segments[0].end == found.segments[1].start < 25.4
    assert found.segments[1].end == 50.0


def test_a_short_context_is_heard_in_windows_of_its_length() -> None:
    scripted, speech = _scripted({1.0: [_result(A)]})
    found = heard(speech, _tone(1.0, 3.2), Conditions(seconds=1.5, timestamps=False))
    assert {frames for _, frames in scripted.batches} == {150}
    assert found.seconds == 3.2
    assert all(s.end - s.start <= 1.5 for s in found.segments)


@pytest.mark.parametrize(
    "audio", [torch.zeros(RATE * 70), torch.zeros(160), _tone(1.0, 0.01), _tone(1e-6, 5.0)]
)
def test_silence_and_ten_milliseconds_hold_no_speech_and_are_not_decoded(audio: Tensor) -> None:
    scripted, speech = _scripted({1.0: [_result(A)]})
    found = heard(speech, audio)
    assert (found.text, found.complete) == ("", True)
    assert found.seconds == len(audio) / RATE
    assert scripted.batches == []


def test_what_the_model_takes_for_silence_has_no_text() -> None:
    _, speech = _scripted({1.0: [_result(A, no_speech_prob=0.9, avg_logprob=-1.5)]})
    assert heard(speech, _tone(1.0, 2.0)).text == ""
    _, speech = _scripted({1.0: [_result(A, no_speech_prob=0.9, avg_logprob=-0.5)]})
    assert heard(speech, _tone(1.0, 2.0)).text == "one two"


@pytest.mark.parametrize("figures", [{"avg_logprob": -1.5}, {"compression_ratio": 2.5}])
def test_a_doubtful_text_is_drawn_again_at_higher_temperatures(figures: dict[str, float]) -> None:
    doubtful, sure = _result(A, **figures), _result(B)
    scripted, speech = _scripted({1.0: [doubtful, doubtful, sure]})
    assert heard(speech, _tone(1.0, 2.0), manner=Manner(beam=3)).text == "three"
    assert [(a.temperature, a.beam) for a in scripted.asked] == [(0.0, 3), (0.2, None), (0.4, None)]
    scripted, speech = _scripted({1.0: [doubtful]})
    assert heard(speech, _tone(1.0, 2.0)).text == "one two"  # the last draw stands
    assert [a.temperature for a in scripted.asked] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_recordings_run_side_by_side_and_each_keeps_its_own_text() -> None:
    scripted, speech = _scripted({1.0: [_result(A)], 0.01: [_result(B)]})
    sources = [_tone(1.0, 2.0), _tone(0.01, 40.0), _tone(1.0, 3.0)]
    grown = dict(transcribe_all(speech, sources, manner=Manner(batch=2)))
    assert [grown[i].text for i in range(3)] == ["one two", "three three", "one two"]
    assert [grown[i].seconds for i in range(3)] == [2.0, 40.0, 3.0]
    assert [size for size, _ in scripted.batches] == [2, 2]


def test_a_chooser_hears_each_window_and_contexts_do_not_share_a_batch() -> None:
    short = Conditions(seconds=1.0, timestamps=False)

    def choose(audio: Tensor) -> Conditions:
        return short if float(audio.abs().max()) < 0.1 else Conditions()

    scripted, speech = _scripted({1.0: [_result(A)], 0.01: [_result(B)]})
    found = dict(transcribe_all(speech, [_tone(1.0, 2.0), _tone(0.01, 1.0)], choose))
    assert [found[i].text for i in range(2)] == ["one two", "three"]
    assert sorted(scripted.batches) == [(1, 100), (1, 3000)]


def test_a_recording_that_cannot_be_read_leaves_the_others_alone(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("no audio")
    _, speech = _scripted({1.0: [_result(A)]})
    found = dict(transcribe_all(speech, [tmp_path / "a.wav", _tone(1.0, 2.0)]))
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

    loud, quiet = _tone(1.0, 1.0), _tone(0.01, 1.0)
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
        heard(tiny_speech("transformers"), _tone(1.0, 1.0), manner=Manner(word_times=True))


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


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """The verb with a scripted Whisper in place of a real one."""
    made, speech = _scripted({1.0: [_result([_at(0), *A, _at(1), _at(1), *B, _at(2)])]})
    monkeypatch.setattr(ears, "ears", lambda wanted: (speech, Conditions()))
    return made


def _wav(path: Path, seconds: float) -> str:
    soundfile.write(path, _tone(1.0, seconds).numpy(), RATE, subtype="FLOAT")
    return str(path)


def test_one_file_is_printed_line_by_line(
    scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transcribe.main([_wav(tmp_path / "a.wav", 2.0)]) == 0
    assert capsys.readouterr().out == "one two\nthree\n"


def test_several_files_are_printed_by_name_and_written_in_every_format(
    scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [_wav(tmp_path / name, 2.0) for name in ("a.wav", "b.wav")]
    out = tmp_path / "out"
    assert transcribe.main([*files, "--out", str(out), "--format", "txt,srt,vtt,json"]) == 0
    assert capsys.readouterr().out == "".join(f"{file}\tone two three\n" for file in files)
    assert {p.name for p in out.iterdir()} == {
        f"{stem}.{kind}" for stem in "ab" for kind in FORMATS
    }
    assert (out / "a.txt").read_text() == "one two\nthree\n"
    assert json.loads((out / "b.json").read_text())["complete"] is True


def test_a_format_can_go_to_stdout(
    scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transcribe.main([_wav(tmp_path / "a.wav", 2.0), "--format", "srt"]) == 0
    assert capsys.readouterr().out.startswith("1\n00:00:00,000 --> 00:00:01,000\none two\n")


def test_a_bad_file_is_one_line_and_the_others_are_written(
    scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.wav").write_text("no audio")
    files = [str(tmp_path / "bad.wav"), _wav(tmp_path / "a.wav", 2.0)]
    assert transcribe.main([*files, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == f"{files[1]}\tone two three\n"
    assert re.fullmatch(r"polyadapt: \S+bad\.wav is not audio .*\n", said.err)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.txt"]


def test_what_breaks_off_in_the_middle_is_written_as_partial(
    scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audio = _tone(1.0, 70.0).numpy()
    audio[65 * RATE] = np.nan
    soundfile.write(tmp_path / "a.wav", audio, RATE, subtype="FLOAT")
    out = tmp_path / "out"
    assert transcribe.main([str(tmp_path / "a.wav"), "--out", str(out), "--format", "json"]) == 2
    assert "NaN or infinite, after 60.0 s" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["a.partial.json"]
    record = json.loads((out / "a.partial.json").read_text())
    assert (record["complete"], record["seconds"]) == (False, 60.0)


def test_ctrl_c_keeps_what_was_heard_so_far(
    scripted: Scripted,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = [_wav(tmp_path / "a.wav", 2.0), _wav(tmp_path / "b.wav", 70.0)]
    original = scripted.decode_states

    def pressed(states: Tensor, asked: Decoding) -> list[DecodingResult]:
        if len(scripted.asked) == 2:
            raise KeyboardInterrupt
        return original(states, asked)

    monkeypatch.setattr(scripted, "decode_states", pressed)
    out = tmp_path / "out"
    assert transcribe.main([*files, "--out", str(out)]) == 130
    said = capsys.readouterr()
    assert f"interrupted: {files[1]} is heard up to 1:00" in said.err
    assert {p.name for p in out.iterdir()} == {"a.txt", "b.partial.txt"}
    assert (out / "b.partial.txt").read_text() == "one two\nthree\n" * 2
    # A later run that ends replaces the part by the whole.
    monkeypatch.setattr(scripted, "decode_states", original)
    assert transcribe.main([files[1], "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {"a.txt", "b.txt"}


def test_options_that_do_not_fit_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    cases: list[tuple[list[str], str]] = [
        (["a.wav", "--format", "doc"], "--format 'doc' is unknown: allowed are txt, srt"),
        (["a.wav", "--format", "srt,vtt"], "need --out FOLDER"),
        (["a.wav", "b.wav", "--format", "json"], "need --out FOLDER"),
        (["x/a.wav", "y/a.mp3", "--out", str(tmp_path)], "two files are called 'a'"),
        (["a.wav", "--beam", "0"], "not a whole number from 1"),
        ([], "required"),
    ]
    for argv, message in cases:
        with pytest.raises(AdaptError, match=message):
            transcribe.main(argv)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tiny.en", OpenAIWhisper(name="tiny.en")),
        ("openai/whisper-small", TransformersWhisper(name="openai/whisper-small")),
        ("offline", OfflineTinyEn()),
        ("offline:transformers", OfflineTinyEn(layout="transformers")),
    ],
)
def test_a_model_is_named_as_its_library_names_it(name: str, wanted: Any) -> None:
    assert ears.backbone_named(name) == wanted


def test_a_folder_is_of_transformers_and_a_file_of_openai(tmp_path: Path) -> None:
    (tmp_path / "small.pt").write_bytes(b"")
    assert isinstance(ears.backbone_named(str(tmp_path)), TransformersWhisper)
    assert isinstance(ears.backbone_named(str(tmp_path / "small.pt")), OpenAIWhisper)


def test_a_set_and_a_bundle_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdaptError, match="not both"):
        ears.ears(ears.Wanted(set=tmp_path / "a", sets=tmp_path))
