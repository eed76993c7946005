"""`polyadapt speech make-bundle`: a bundle that chooses, from sets and clips, in one command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from polyadapt.core.cli import main as polyadapt
from polyadapt.speech import equipment
from polyadapt.speech.bundle import Bundle
from polyadapt.speech.decision import Scenario
from polyadapt.speech.make_bundle import main
from polyadapt.tests.bundle_making import LABELS, SCRIPT, quick, save_clips, save_set, script, sets
from polyadapt.tests.speech_cases import save_whisper

pytestmark = pytest.mark.slow  # whole runs


@pytest.fixture(autouse=True)
def _in_a_folder_with_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_whisper()
    save_clips()
    script(monkeypatch, SCRIPT)


def contents(folder: str = "bundle") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_sets_labels_matrix_gain_and_pictures_are_in_the_folder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert polyadapt(["speech", "make-bundle", *quick(*sets(*LABELS), "--general", "all")]) == 0
    assert {*contents()} == {
        *(f"{name}.safetensors" for name in LABELS),
        "bundle.json",
        "selector.safetensors",
        "confusion.png",
        "wer.png",
    }
    made = Bundle.open("bundle")
    assert made.labels == {
        "hiss": Scenario("white", -5, 10),
        "voice": Scenario("side", -5, 10),
        "all": Scenario(None, -5, 10),
    }
    assert made.deaf == ""
    assert made.decision is not None
    costs = made.decision.costs
    assert costs.scenarios == (Scenario("white"), Scenario("side"))
    assert dict(zip(costs.sets, costs.wer, strict=True)) == {
        "none": (100, 100),
        "hiss": (0, 100),
        "voice": (100, 0),
        "all": (50, 50),
    }
    assert costs.general == "all"
    assert made.decision.gain is not None
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "selector: 8 mixtures of 4 clips with white, side"
    assert (
        "8 mixtures of 2 validation clips are transcribed without a set and with hiss, voice, a"
        "ll" in said
    )
    assert "8 of 8 mixtures are transcribed" in said
    assert "hiss        0.0  100.0" in said
    assert said[-3:-1] == ["bundle/confusion.png", "bundle/wer.png"]
    assert said[-1] == made.decision.advice()


def test_the_same_seed_makes_the_same_bundle_and_another_one_another() -> None:
    given = sets("hiss", "voice")
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main([folder, *quick(*given, "--seed", str(seed))[1:]]) == 0
    assert contents("a") == contents("b")
    assert contents("a")["selector.safetensors"] != contents("c")["selector.safetensors"]


def test_a_set_is_added_later_and_the_others_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(quick(*sets("hiss", "all"), "--general", "all", "--threshold", "0.25", "--clean"))
    before = contents()
    pink = {"category": "pink", "snr_db": [-5, 5], "convention": "full"}
    script(
        monkeypatch,
        {"none": ["x"], "hiss": ["cat"], "all": ["cat"], "late": ["cat dog"]},
    )
    assert main(quick("--add", f"late={save_set('adapter', pink)}")) == 0
    made = Bundle.open("bundle")
    assert made.names == ["hiss", "all", "late"]
    assert made.labels["late"] == Scenario("pink", -5, 5)
    for name in ("hiss", "all"):
        assert contents()[f"{name}.safetensors"] == before[f"{name}.safetensors"]
    assert contents()["wer.png"] != before["wer.png"]
    assert made.deaf == ""
    assert made.decision is not None
    assert made.decision.classes == ("white", "side", "pink", "clean")
    assert [str(s) for s in made.decision.costs.scenarios[:2]] == [
        "white below 5 dB",
        "white above 5 dB",
    ]
    assert made.decision.costs.wer == ((100,) * 7, (50,) * 7, (50,) * 7, (0,) * 7)
    assert (made.decision.costs.general, made.decision.threshold) == ("all", 0.25)
    assert made.decision.sigma > 0  # an SNR decides now, and the selector errs in it
    assert re.search(r"late +0\.0", capsys.readouterr().out)


def test_a_bundles_own_labels_serve_where_a_file_has_none() -> None:
    from polyadapt.speech.bundle import create

    create("bundle", {"old": save_set("old")}, {"old": Scenario("white", high=5)})
    with pytest.MonkeyPatch.context() as patch:
        script(patch, {"none": ["x"], "old": ["cat"], "voice": ["cat dog"]})
        assert main(quick("--add", save_set("voice", LABELS["voice"]))) == 0
    made = Bundle.open("bundle")
    assert made.decision is not None
    assert made.decision.classes == ("white", "side")
    assert len(made.decision.costs.scenarios) == 4  # both are cut at 5 dB


def test_the_data_of_a_configuration_are_taken_without_their_noise(tmp_path: Path) -> None:
    noise = {"kinds": ["engine"], "low": 0, "high": 0}
    data = {"class_path": "Manifest", "init_args": {"path": "m.csv", "noise": noise, "seed": 3}}
    Path("fit.yaml").write_text(json.dumps({"model": {"seconds": 0.6}, "data": data}))
    assert main(quick(*sets("hiss", "voice"), data="fit.yaml")) == 0
    made = Bundle.open("bundle")
    assert made.record.hearing.split_seed == 3
    assert made.decision is not None
    assert made.decision.classes == ("white", "side")


def test_recordings_and_a_limit_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    import soundfile

    Path("hum").mkdir()
    for number in range(4):
        tone = torch.sin(torch.arange(8_000) * 0.05 * (1 + number))
        soundfile.write(f"hum/{number}.wav", tone.numpy(), 16_000)
    save_clips(count=8, val=4)
    label = {"category": "hum", "snr_db": [0, 0], "convention": "active-40"}
    hum = save_set("hiss", label)
    assert main(quick("--set", hum, "--noise-folder", "hum", "--limit", "2")) == 0
    made = Bundle.open("bundle")
    assert made.labels == {"hiss": Scenario("hum")}
    assert str(made.record.hearing.convention) == "active-40"
    assert "2 mixtures of 2 validation clips" in capsys.readouterr().out


def test_ctrl_c_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    given = sets("hiss", "voice")
    before = {*Path().iterdir()}
    monkeypatch.setattr(equipment, "tried", stopped)
    assert polyadapt(["speech", "make-bundle", *quick(*given)]) == 130
    assert {*Path().iterdir()} == before
