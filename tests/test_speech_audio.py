"""Audio files become 16 kHz mono, and clips spectrograms that depend on nobody else."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.speech import audio
from polyadapt.speech.audio import (
    Recording,
    excerpts,
    frames_of,
    log_mel,
    pieces,
    read_audio,
    seconds_of,
)


def _tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray[tuple[int], np.dtype]:
    return 0.5 * np.sin(2 * math.pi * hertz * np.arange(round(seconds * rate)) / rate)


def _error(path: Path) -> str:
    with pytest.raises(AdaptError) as caught:
        read_audio(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_any_rate_becomes_16_khz_with_the_same_tone(rate: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", _tone(1.0, rate), rate, subtype="FLOAT")
    found = read_audio(tmp_path / "a.wav")
    assert found.dtype == torch.float32
    assert len(found) == 16_000
    wanted = torch.from_numpy(_tone(1.0, 16_000)).float()
    inner = slice(1_000, -1_000)  # the filter rings at both ends
    assert torch.allclose(found[inner], wanted[inner], atol=1e-3)


def test_channels_are_averaged(tmp_path: Path) -> None:
    both = np.stack([np.full(1_600, 0.5), np.full(1_600, -0.25)], axis=1)
    soundfile.write(tmp_path / "a.wav", both, 16_000, subtype="FLOAT")
    assert torch.equal(read_audio(tmp_path / "a.wav"), torch.full((1_600,), 0.125))


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_every_format_of_libsndfile_is_read(kind: str, tmp_path: Path) -> None:
    soundfile.write(tmp_path / f"a.{kind}", _tone(1.0, 16_000), 16_000)
    found = read_audio(tmp_path / f"a.{kind}")
    assert abs(len(found) - 16_000) < 2_000  # mp3 pads
    assert float(found.square().mean().sqrt()) == pytest.approx(0.5 / math.sqrt(2), rel=0.05)
    assert seconds_of(tmp_path / f"a.{kind}") == pytest.approx(1.0, abs=0.1)


def test_pieces_are_the_whole_in_order(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", _tone(25.0, 8_000), 8_000)
    parts = list(pieces(tmp_path / "a.wav"))
    assert len(parts) >= 3
    assert max(map(len, parts)) <= 11 * 16_000
    assert torch.equal(torch.cat(parts), read_audio(tmp_path / "a.wav"))
    assert len(torch.cat(parts)) == 25 * 16_000


def test_a_text_file_named_wav_is_not_audio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no ffmpeg there
    (tmp_path / "a.wav").write_text("And so my fellow Americans\n" * 100)
    assert "a.wav is not audio that libsndfile reads (Format not recognised)" in _error(
        tmp_path / "a.wav"
    )


def test_what_cannot_be_heard_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "there is no audio file" in _error(tmp_path / "none.wav")
    assert "is a folder" in _error(tmp_path)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    assert "holds no sample" in _error(tmp_path / "empty.wav")
    for bad in (math.nan, math.inf):
        soundfile.write(tmp_path / "bad.wav", np.array([0.0, bad, 0.0]), 16_000, subtype="FLOAT")
        assert "samples that are NaN or infinite, from 0.0 s on" in _error(tmp_path / "bad.wav")
    late = np.zeros(400_000)
    late[384_000] = math.nan
    soundfile.write(tmp_path / "late.wav", late, 16_000, subtype="FLOAT")
    assert "NaN or infinite, from 24.0 s on" in _error(tmp_path / "late.wav")


def test_a_flac_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.random.randn(160_000) / 9, 16_000)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(whole[: len(whole) // 2])
    assert "damaged or cut short" in _error(tmp_path / "a.flac")


def _ffmpeg(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for ffmpeg: what counts here is how it is called and what becomes of it."""
    (folder / "ffmpeg").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_what_libsndfile_does_not_know_goes_through_ffmpeg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = np.arange(5, dtype="<f4") / 8
    (tmp_path / "out").write_bytes(samples.tobytes())
    _ffmpeg(tmp_path, f'echo "$@" > {tmp_path}/asked; cat {tmp_path}/out', monkeypatch)
    (tmp_path / "-a.m4a").write_bytes(b"\0" * 100)
    assert torch.equal(read_audio(tmp_path / "-a.m4a"), torch.arange(5) / 8)
    asked = (tmp_path / "asked").read_text()
    assert f"-i file:{tmp_path / '-a.m4a'} -f f32le -ac 1 -ar 16000 -" in asked


def test_a_complaint_of_ffmpeg_is_passed_on_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ffmpeg(tmp_path, 'echo "first" >&2; echo "no such codec" >&2; exit 1', monkeypatch)
    (tmp_path / "a.m4a").write_bytes(b"\0" * 100)
    assert _error(tmp_path / "a.m4a").endswith("libsndfile or ffmpeg reads: no such codec")


def test_a_reader_that_stops_early_leaves_no_ffmpeg_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio, "_PIECE", 1)
    _ffmpeg(tmp_path, "exec cat /dev/zero", monkeypatch)
    (tmp_path / "a.m4a").write_bytes(b"\0" * 100)
    endless = pieces(tmp_path / "a.m4a")
    assert len(next(endless)) == 16_000
    endless.close()  # type: ignore[attr-defined]  # returns only when the process is gone


def _clips() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(n, generator=generator) * gain for n, gain in ((16_000, 0.5), (9_000, 1e-3))
    ]


def test_a_batch_of_a_loud_and_a_quiet_clip_is_each_by_itself() -> None:
    clips = _clips()
    batch = log_mel(clips, seconds=2.0)
    assert batch.shape == (2, 80, 200)
    for clip, mel in zip(clips, batch, strict=True):
        assert torch.equal(mel, log_mel([clip], seconds=2.0)[0])


def test_padding_is_the_floor_of_the_clip_and_not_zero() -> None:
    for mel in log_mel(_clips(), seconds=2.0):
        assert torch.equal(mel[:, 110:], torch.full((80, 90), float(mel.min())))
        floor = max(float(mel.max()) - 8 / 4, -1.5)  # -1.5 is digital silence
        assert float(mel.min()) == pytest.approx(floor)
    assert torch.equal(log_mel([torch.zeros(160)]), torch.full((1, 80, 3000), -1.5))


def test_a_longer_context_changes_no_frame_but_the_last() -> None:
    clip = _clips()[0]
    short, long = log_mel([clip], seconds=1.0)[0], log_mel([clip], seconds=30.0)[0]
    assert torch.allclose(short[:, :-1], long[:, :99], atol=1e-5)


def test_both_numbers_of_bands_are_known_and_no_other() -> None:
    assert log_mel([torch.zeros(160)], 128, 0.02).shape == (1, 128, 2)
    with pytest.raises(AdaptError, match="no filters for 64 mel bands"):
        log_mel([torch.zeros(160)], 64)


def test_frames_are_even_and_within_whispers_context() -> None:
    assert [frames_of(s) for s in (30.0, 1.2, 1.21, 0.02, 0.001)] == [3000, 120, 122, 2, 2]
    for seconds in (0.0, -1.0, 30.01, math.nan):
        with pytest.raises(AdaptError, match="more than 0 and at most 30 s"):
            frames_of(seconds)


def test_clips_that_do_not_fit_the_context_are_refused() -> None:
    with pytest.raises(AdaptError, match=r"n at most 16000 \(1 s\), not \[16001\]"):
        log_mel([torch.zeros(16_001)], seconds=1.0)
    with pytest.raises(AdaptError, match=r"not \[2, 160\]"):
        log_mel([torch.zeros(2, 160)])
    with pytest.raises(AdaptError, match="at least one clip"):
        log_mel([])


def test_a_recording_is_heard_forward_and_keeps_no_more_than_a_window(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", _tone(60.0, 16_000), 16_000, subtype="FLOAT")
    whole, recording = read_audio(tmp_path / "a.wav"), Recording(tmp_path / "a.wav")
    for start in (0, 100_000, 100_000, 700_000):
        assert torch.equal(recording.window(start, 160_000), whole[start : start + 160_000])
        assert len(recording._held) <= 160_000 + 2 * 160_000
    assert recording.window(900_000, 160_000).shape == (60_000,)
    assert recording.ends_by(960_000)
    assert not recording.ends_by(959_999)
    assert recording.window(960_000, 10).shape == (0,)


def _of_hours(monkeypatch: pytest.MonkeyPatch, hours: int, path: Path) -> Path:
    """A file that says it lasts so many hours; its samples count pieces of 10 s."""
    seconds = 3600 * hours
    path.write_bytes(b"")
    numbers = (torch.full((10 * 16_000,), float(i)) for i in range(0, seconds, 10))
    monkeypatch.setattr(audio, "pieces", lambda path: numbers)
    monkeypatch.setattr(audio, "seconds_of", lambda path: float(seconds))
    return path


def test_excerpts_of_three_hours_are_read_without_what_lies_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    class Watched(Recording):
        def _read(self) -> bool:
            held.append(len(self._held) / 16_000)
            return super()._read()

    monkeypatch.setattr(audio, "Recording", Watched)
    parts = list(excerpts(_of_hours(monkeypatch, 3, tmp_path / "a"), 30 * 16_000, most=4))
    assert [len(part) for part in parts] == [480_000] * 4
    assert [int(part[0]) for part in parts] == [0, 3590, 7180, 10770]
    assert max(held) <= 30


def test_excerpts_of_what_only_decoding_measures_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(tmp_path / "a.wav", _tone(5.0, 8_000), 8_000)
    known = list(excerpts(tmp_path / "a.wav", 32_000, most=8))
    assert [len(part) for part in known] == [32_000] * 3
    monkeypatch.setattr(audio, "seconds_of", lambda path: None)
    unknown = list(excerpts(tmp_path / "a.wav", 32_000, most=8))
    assert all(torch.equal(*pair) for pair in zip(known, unknown, strict=True))
    whole = read_audio(tmp_path / "a.wav")
    assert torch.equal(known[2], whole[48_000:])
    assert [len(part) for part in excerpts(whole, 100_000, most=8)] == [80_000]
