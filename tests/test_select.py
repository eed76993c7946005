"""`polyadapt speech select` and its pictures: what is told about a clip and about the choice."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from matplotlib import image
from torch import Tensor

from polyadapt.core import AdaptError
from polyadapt.speech.audio import SAMPLE_RATE
from polyadapt.speech.decision import Choice, Costs, Interval
from polyadapt.speech.pictures import confusion_matrix, wer_heat_map
from polyadapt.speech.scenes import seeded, synthetic_scenes
from polyadapt.speech.select import main, told
from polyadapt.speech.synthetic import speech_like
from polyadapt.tests.speech_bundles import COSTS, bundle, decision, trained_selector


def saved(path: Path, kind: str, rate: int = SAMPLE_RATE, channels: int = 1) -> str:
    clip = speech_like(SAMPLE_RATE, seeded("test clip")) / 20
    samples = synthetic_scenes((kind,), (0.0,))[kind].draw(clip, seeded(kind))[0]
    held = samples.unsqueeze(1).expand(-1, channels)[:: SAMPLE_RATE // rate]
    soundfile.write(path, held.numpy(), rate)
    return str(path)


def test_scenario_probabilities_expected_wer_choice_and_advice_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle(tmp_path / "b", trained_selector())
    clips = [saved(tmp_path / "a.wav", "white"), saved(tmp_path / "v.wav", "side", channels=2)]
    assert main([*clips, "--sets", str(tmp_path / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert lines[0].startswith(f"{clips[0]}: white, SNR ")
    assert re.fullmatch(r"  probability: white (0\.\d\d|1\.00), side 0\.\d\d", lines[1])
    assert lines[2].startswith("  expected WER in %: hiss 2")
    assert [word.split()[0] for word in lines[2].split(": ")[1].split(", ")][-1] == "none"
    assert lines[3] == "  choice: hiss (least expected WER)"
    assert lines[7] == "  choice: voice (least expected WER)"
    assert lines[8] == (
        "choosing is worthwhile: against 'general' for everything it gains 4.0 points (1.5 to 6.5)"
    )


def test_it_says_when_choosing_is_not_worthwhile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = bundle(tmp_path / "b")
    opened.equip(trained_selector(), decision(gain=Interval(0.4, -0.9, 1.7)))
    assert main([saved(tmp_path / "a.wav", "white"), "--sets", str(opened.folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "choosing is not worthwhile here: against 'general' for everything it gains"
        " 0.4 points (-0.9 to 1.7), an interval that reaches zero"
    )


def test_odd_clips_get_a_line_each_and_the_others_an_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = bundle(tmp_path / "b", trained_selector())
    (tmp_path / "text.wav").write_text("not audio")
    soundfile.write(tmp_path / "nan.wav", np.full(400, np.nan), SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "silence.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    soundfile.write(tmp_path / "short.wav", np.full(80, 0.5), 8000)
    names = ("text.wav", "nan.wav", "absent.wav", "silence.wav", "short.wav")
    clips = [str(tmp_path / name) for name in names]
    low = saved(tmp_path / "low.wav", "side", rate=8000)
    assert main([*clips, low, "--sets", str(opened.folder)]) == 2
    told_of = capsys.readouterr()
    errors = told_of.err.splitlines()
    assert len(errors) == 3
    for line, name in zip(errors, names, strict=False):
        assert line.startswith("polyadapt: skipped: ")
        assert name in line
    assert told_of.out.count("choice: general (nothing to hear: silence, or less than 0.1 s)") == 2
    assert f"{low}: " in told_of.out


def test_a_damaged_set_is_named_and_not_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = bundle(tmp_path / "b", trained_selector())
    opened.file("hiss").write_bytes(b"")
    assert main([saved(tmp_path / "a.wav", "white"), "--sets", str(opened.folder)]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("polyadapt: set 'hiss' is left out: hiss.safetensors is not the")
    assert "choice: general (least expected WER)" in said.out


def test_a_bundle_that_cannot_choose_is_refused_at_once(tmp_path: Path) -> None:
    opened = bundle(tmp_path / "b")
    with pytest.raises(AdaptError, match="cannot be chosen automatically: the bundle has no sel"):
        main(["absent.wav", "--sets", str(opened.folder)])
    with pytest.raises(AdaptError, match="is no bundle"):
        main(["absent.wav", "--sets", str(tmp_path)])
    with pytest.raises(AdaptError, match="required: --sets"):
        main(["absent.wav"])


def test_the_base_is_named_for_what_it_is() -> None:
    assert told("a.wav", Choice(None, "unknown noise 'wind'")) == (
        "a.wav: unknown\n  choice: none, the frozen base (unknown noise 'wind')"
    )


def pixels(picture: bytes) -> Tensor:
    return torch.from_numpy(image.imread(io.BytesIO(picture)))


def test_a_confusion_is_darker_where_more_was_confused() -> None:
    names = ["babble", "music"]
    right, wrong = (confusion_matrix(torch.tensor(c), names, "t") for c in (RIGHT, WRONG))
    assert pixels(right).shape == pixels(wrong).shape
    assert not torch.equal(pixels(right), pixels(wrong))
    assert confusion_matrix(torch.zeros(2, 2), names, "nothing yet")


RIGHT, WRONG = [[9, 1], [0, 10]], [[1, 9], [10, 0]]


def test_the_heat_map_grows_with_sets_and_noise() -> None:
    small = pixels(wer_heat_map(COSTS, "WER by set and noise"))

    rows = tuple(f"set{i}" for i in range(6))
    more = Costs((*COSTS.sets, *rows), COSTS.scenarios, COSTS.wer + ((1.0, 2.0),) * 6)
    large = pixels(wer_heat_map(more, "WER by set and noise"))
    assert large.shape[0] > small.shape[0]
    assert float(small[..., :3].std()) > 0.05  # not an empty sheet
