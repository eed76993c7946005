"""`polyadapt speech make-bundle` says what is wrong in one line, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polyadapt.core import AdaptError
from polyadapt.speech.bundle import create
from polyadapt.speech.decision import Scenario
from polyadapt.speech.make_bundle import main
from polyadapt.tests.bundle_making import LABELS, quick, save_clips, save_set, sets
from polyadapt.tests.speech_cases import save_whisper

pytestmark = pytest.mark.slow  # whole runs


@pytest.fixture(autouse=True)
def _in_a_folder_with_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_whisper()
    save_clips()


def refused(words: list[str], why: str) -> None:
    before = {*Path().rglob("*")}
    with pytest.raises(AdaptError, match=why) as caught:
        main(words)
    assert "\n" not in str(caught.value)
    assert {*Path().rglob("*")} == before


WHITE = LABELS["hiss"]


@pytest.mark.parametrize(
    ("label", "why"),
    [
        (None, "hiss.safetensors has no label that says which noise it is for"),
        ({**WHITE, "snr_db": "loud"}, "hiss.safetensors: its label .* cannot be read"),
        ({**WHITE, "snr_db": [1, 2, 3]}, "hiss.safetensors: its label .* cannot be read"),
        ({**WHITE, "convention": "peak"}, "cannot be read: unknown SNR convention 'peak'"),
        ({**WHITE, "category": "wind"}, "unknown synthetic noise 'wind'; allowed: babble"),
        ({**WHITE, "snr_db": [9, 3]}, "from 9.0 to 3.0 dB: low must be below high"),
        ({**WHITE, "own_speakers": True}, "own_speakers is for babble and side"),
    ],
)
def test_a_label_that_tells_no_noise(label: dict[str, Any] | None, why: str) -> None:
    refused(quick("--set", save_set("hiss", label)), why)


def test_sets_that_do_not_go_together() -> None:
    other = save_set("other", {**WHITE, "convention": "active-40"})
    refused(quick(*sets("hiss"), "--set", other), "by full and active-40: a bundle needs one")
    split = save_set("split", WHITE, digits=True)
    refused(quick(*sets("hiss"), "--set", split), "'hiss' and 'split' differ in normaliser")


def test_names_that_are_taken_odd_or_unknown() -> None:
    given = sets("hiss", "voice")
    refused(quick(*given, "--set", "hiss=voice.safetensors"), "two sets are called 'hiss'")
    refused(quick(*given, "--set", "auto=voice.safetensors"), "cannot be called 'auto'")
    refused(quick(*given, "--general", "all"), "'all' is none of the sets: hiss, voice, none")
    refused(quick(*given, "--threshold", "2"), "threshold 2.0 is not allowed: from 0 to 1")
    refused(quick(*given, "--set", "absent.safetensors"), "absent.safetensors")


def test_clips_that_are_too_few() -> None:
    save_clips(count=3, val=1)
    refused(quick(*sets("hiss")), "1 validation clips with words are too few")
    refused(quick(*sets("hiss"), data="gone.csv"), "there is no manifest gone.csv")


def test_configurations_that_name_no_data() -> None:
    given = sets("hiss")
    Path("a.yaml").write_text("model: {}\n")
    refused(quick(*given, data="a.yaml"), "the configuration a.yaml has no key 'data'")
    refused(
        [*quick(*given, data="a.yaml"), "--data", "a.yaml", "m.csv"],
        "a.yaml is a configuration: give one, or manifests alone",
    )
    Path("a.yaml").write_text("data: {class_path: Manifesto, init_args: {path: m.csv}}\n")
    refused(quick(*given, data="a.yaml"), "Manifesto")
    Path("a.yaml").write_text("data: [\n")
    refused(quick(*given, data="a.yaml"), "cannot read a.yaml")


def test_folders_that_are_full_or_no_bundle() -> None:
    given = sets("hiss")
    refused(quick("--add", "hiss.safetensors"), "is no bundle")
    Path("bundle").mkdir()
    Path("bundle/note.txt").touch()
    refused(quick(*given), "bundle exists and is no empty folder")
    refused(["no/such", *quick(*given)[1:]], "the folder no does not exist")


def test_sets_that_a_bundle_has_or_has_lost() -> None:
    create("bundle", {"hiss": save_set("hiss", WHITE)}, {"hiss": Scenario("white")})
    refused(quick("--add", "hiss.safetensors"), "bundle has a set 'hiss' already")
    Path("bundle/hiss.safetensors").write_bytes(b"")
    new = save_set("voice", LABELS["voice"])
    refused(quick("--add", new), "set 'hiss' is damaged")


def test_words_that_contradict_each_other() -> None:
    refused(quick("--set", "a", "--add", "b"), "not allowed with argument")
    refused(quick(), "one of the arguments --set --add is required")
    refused(quick("--set", "a", "--limit", "0"), "'0' is not a whole number from 1")
