"""`polyadapt speech transcribe`: what is printed, what is written, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from torch import Tensor
from whisper.decoding import DecodingResult

from polyadapt.core import cli
from polyadapt.core.errors import AdaptError
from polyadapt.speech import ears, transcribe
from polyadapt.speech.backbones import OfflineTinyEn, OpenAIWhisper, TransformersWhisper
from polyadapt.speech.decoding import Decoding
from polyadapt.speech.subtitles import FORMATS
from polyadapt.speech.transcription import Conditions
from polyadapt.tests.scripted_speech import (
    RATE,
    A,
    B,
    Scripted,
    at,
    result,
    scripted_speech,
    tone,
)
from polyadapt.tests.speech_models import tiny_speech


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """The verb with a scripted Whisper in place of a real one."""
    made, speech = scripted_speech({1.0: [result([at(0), *A, at(1), at(1), *B, at(2)])]})
    monkeypatch.setattr(ears, "ears", lambda wanted: (speech, Conditions()))
    return made


def _wav(path: Path, seconds: float) -> str:
    soundfile.write(path, tone(1.0, seconds).numpy(), RATE, subtype="FLOAT")
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
    audio = tone(1.0, 70.0).numpy()
    audio[65 * RATE] = np.nan
    soundfile.write(tmp_path / "a.wav", audio, RATE, subtype="FLOAT")
    out = tmp_path / "out"
    assert transcribe.main([str(tmp_path / "a.wav"), "--out", str(out), "--format", "json"]) == 2
    assert "NaN or infinite, from 65.0 s on" in capsys.readouterr().err
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
    assert said.err == f"polyadapt: interrupted: {files[1]} is heard up to 1:00\n"
    assert {p.name for p in out.iterdir()} == {"a.txt", "b.partial.txt"}
    assert (out / "b.partial.txt").read_text() == "one two\nthree\n" * 2
    # A later run that ends replaces the part by the whole.
    monkeypatch.setattr(scripted, "decode_states", original)
    assert transcribe.main([files[1], "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {"a.txt", "b.txt"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--language", "de"], r"English-only \(tiny.en, .*cannot take the language 'de'"),
        (["--language", "klingon"], "no language 'klingon'"),
        (["--task", "translate"], "English-only .* cannot translate"),
    ],
)
def test_what_an_english_model_cannot_do_is_one_line(
    asked: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ears, "ears", lambda wanted: (tiny_speech(), ears._told(NO_SET, wanted)))
    argv = ["speech", "transcribe", _wav(tmp_path / "a.wav", 1.0), *asked]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert re.fullmatch(f"polyadapt: .*{said}.*\n", told.err)
    assert (told.out, list((tmp_path / "out").iterdir())) == ("", [])


NO_SET = Conditions()


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
