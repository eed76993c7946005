"""Bundles that are damaged, foreign or misstated: one clear line, and the rest works."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from whisper.model import ModelDimensions, Whisper

from polyadapt.core import AdaptError, LoRA, attach, sets_of
from polyadapt.core.errors import StoreError
from polyadapt.speech.bundle import Bundle, create
from polyadapt.speech.bundle_record import sha256
from polyadapt.speech.decision import Costs, Decision, Scenario
from polyadapt.speech.model import speech_of
from polyadapt.speech.selector import Selector
from polyadapt.tests.speech_bundles import (
    CLASSES,
    COSTS,
    LABELS,
    bundle,
    decision,
    lora,
    noisy,
    trained_selector,
)
from polyadapt.tests.speech_models import tiny_speech


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "bundle.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_samples_that_are_no_sound_are_refused(tmp_path: Path) -> None:
    opened = bundle(tmp_path / "b", trained_selector())
    for clip in (torch.tensor([0.0, torch.nan]), torch.full((80, 100), torch.nan)):
        with pytest.raises(AdaptError, match="holds NaN or infinite"):
            opened.choose(clip)


def test_a_name_that_is_taken_and_a_set_of_another_whisper_are_not_added(tmp_path: Path) -> None:
    opened = bundle(tmp_path / "b")
    index = (tmp_path / "b" / "bundle.json").read_bytes()
    lora(tiny_speech(), "hiss").save(tmp_path / "hiss.safetensors")
    with pytest.raises(AdaptError, match="has a set 'hiss' already"):
        opened.add(tmp_path / "hiss.safetensors", Scenario())
    lora(tiny_speech(seed=1), "odd").save(tmp_path / "odd.safetensors")
    with pytest.raises(StoreError, match="'odd' was made on another Whisper than the other sets"):
        opened.add(tmp_path / "odd.safetensors", Scenario())
    with pytest.raises(AdaptError, match="cannot be called 'auto'"):
        opened.add(tmp_path / "odd.safetensors", Scenario(), "auto")
    assert (tmp_path / "b" / "bundle.json").read_bytes() == index
    assert sorted(opened.names) == sorted(LABELS)
    assert not (tmp_path / "b" / "odd.safetensors").exists()


def _swap(value: dict[str, Any], *path: str) -> None:
    for key in path[:-1]:
        value = value[key]
    held = value[path[-1]]
    value[path[-1]] = held[::-1]


@pytest.mark.parametrize("path", [("classes",), ("sets",), ("scenarios",)])
def test_swapping_two_names_fails_the_hash_check(tmp_path: Path, path: tuple[str, ...]) -> None:
    bundle(tmp_path / "b", trained_selector())
    edited(tmp_path / "b", lambda value: _swap(value, "decision", *path))
    opened = Bundle.open(tmp_path / "b")
    with pytest.raises(AdaptError, match="labels are not those that the selector was made with"):
        opened.choose(noisy("white"))
    assert opened.load_onto(tiny_speech()) == list(LABELS)  # by name they all work


def test_swapping_the_labels_of_two_sets_fails_the_hash_check(tmp_path: Path) -> None:
    bundle(tmp_path / "b", trained_selector())

    def swap(value: dict[str, Any]) -> None:
        hiss, voice = value["sets"]["hiss"], value["sets"]["voice"]
        hiss["label"], voice["label"] = voice["label"], hiss["label"]

    edited(tmp_path / "b", swap)
    assert "their hash differs" in Bundle.open(tmp_path / "b").deaf


def test_a_selector_of_another_bundle_is_noticed(tmp_path: Path) -> None:
    bundle(tmp_path / "b", trained_selector())
    (tmp_path / "b" / "selector.safetensors").unlink()
    assert "its selector is damaged: cannot read" in Bundle.open(tmp_path / "b").deaf
    damaged = bundle(tmp_path / "c", trained_selector())
    damage(damaged.folder / "selector.safetensors")
    assert (
        "selector.safetensors is not the file that was put in" in Bundle.open(tmp_path / "c").deaf
    )


@pytest.mark.parametrize("how", ["damaged", "missing", "cut"])
def test_a_damaged_set_is_named_and_the_others_work(tmp_path: Path, how: str) -> None:
    bundle(tmp_path / "b", trained_selector())
    file = tmp_path / "b" / "hiss.safetensors"
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:100])
    else:
        damage(file)
    opened, speech = Bundle.open(tmp_path / "b"), tiny_speech()
    with pytest.warns(UserWarning, match="set 'hiss' is left out: ") as warned:
        assert opened.load_onto(speech) == ["voice", "general"]
    assert len(warned) == 1
    assert str(warned[0].message).isprintable()
    assert set(sets_of(speech.model)) == {"voice", "general"}
    assert opened.choose(noisy("white")).name == "general"  # 30 % where hiss would have 20 %
    assert opened.choose(noisy("side")).name == "voice"


def test_a_set_that_cannot_be_attached_is_left_out_too(tmp_path: Path) -> None:
    """Its digest is right, but it was put there by hand and is none of this Whisper."""
    opened = bundle(tmp_path / "b")
    file = tmp_path / "b" / "voice.safetensors"
    lora(tiny_speech(seed=1), "voice").save(file)

    def sign(value: dict[str, Any]) -> None:
        value["sets"]["voice"]["sha256"] = sha256(file)

    edited(tmp_path / "b", sign)
    opened = Bundle.open(tmp_path / "b")
    assert not opened.damaged
    with pytest.warns(UserWarning, match="set 'voice' is left out: .* made on other weights"):
        assert opened.load_onto(tiny_speech()) == ["hiss", "general"]
    assert list(opened.damaged) == ["voice"]


@pytest.mark.parametrize("other", ["size", "weights"])
def test_a_bundle_for_another_whisper_is_refused_in_one_line(tmp_path: Path, other: str) -> None:
    opened = bundle(tmp_path / "b")
    if other == "weights":
        speech = tiny_speech(seed=1)
    else:
        speech = speech_of(Whisper(ModelDimensions(80, 1500, 128, 2, 3, 51864, 448, 128, 2, 3)))
    with pytest.raises(
        StoreError, match=r"is for another Whisper .* frozen weights differ"
    ) as error:
        opened.load_onto(speech)
    assert str(error.value).isprintable()
    assert not sets_of(speech.model)


def test_names_that_are_attached_already_are_refused(tmp_path: Path) -> None:
    opened, speech = bundle(tmp_path / "b"), tiny_speech()
    attach(speech.model, LoRA(rank=1), "encoder.blocks.0.attn.query", "voice")
    with pytest.raises(AdaptError, match="sets called voice are attached already"):
        opened.load_onto(speech)
    assert list(sets_of(speech.model)) == ["voice"]


def test_creating_is_whole_or_not_at_all(tmp_path: Path) -> None:
    speech = tiny_speech()
    sets = {"hiss": lora(speech, "hiss"), "voice": lora(tiny_speech(seed=1), "voice")}
    labels = {name: LABELS[name] for name in sets}
    with pytest.raises(StoreError, match="was made on another Whisper"):
        create(tmp_path / "b", sets, labels)
    with pytest.raises(StoreError, match=r"there is no adapter file .*absent"):
        create(tmp_path / "b", {"hiss": tmp_path / "absent"}, {"hiss": Scenario()})
    with pytest.raises(AdaptError, match="rows for general, hiss, voice, the bundle has the sets"):
        create(
            tmp_path / "b",
            {"hiss": sets["hiss"]},
            {"hiss": Scenario()},
            trained_selector(),
            decision(),
        )
    assert os.listdir(tmp_path) == []


def test_a_failure_of_the_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(StoreError, match=r"cannot make .*: No space left on device"):
        create(tmp_path / "b", {"hiss": lora(tiny_speech(), "hiss")}, {"hiss": Scenario()})
    assert os.listdir(tmp_path) == []


def test_creating_over_something_else_is_refused(tmp_path: Path) -> None:
    held, labels = {"hiss": lora(tiny_speech(), "hiss")}, {"hiss": Scenario()}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(AdaptError, match="exists and is no empty folder"):
        create(tmp_path / "full", held, labels)
    with pytest.raises(AdaptError, match="does not exist"):
        create(tmp_path / "no" / "b", held, labels)
    with pytest.raises(
        AdaptError, match="a label for each of its sets: sets hiss, labels for rain"
    ):
        create(tmp_path / "b", held, {"rain": Scenario()})
    with pytest.raises(AdaptError, match="give both or neither"):
        create(tmp_path / "b", held, labels, trained_selector())
    (tmp_path / "empty").mkdir()
    assert create(tmp_path / "empty", held, labels).names == ["hiss"]


def test_equipment_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    opened = bundle(tmp_path / "b")
    with pytest.raises(AdaptError, match="the same classes in the same order are needed"):
        opened.equip(Selector(CLASSES[::-1]), decision())
    levels = (Scenario(high=0), Scenario(low=0))
    by_level = Decision(Costs(COSTS.sets, levels, COSTS.wer), CLASSES)
    with pytest.raises(AdaptError, match="columns by SNR, and the selector tells no SNR"):
        opened.equip(Selector(CLASSES, snr=False), by_level)
    opened.equip(trained_selector(), by_level)
    assert opened.choose(noisy("white")).probabilities.keys() == {
        "any below 0 dB",
        "any above 0 dB",
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is no bundle: bundle.json: No such file"),
        ("[1", "is damaged: it is not JSON"),
        ("[]", "has format None; this version reads 1"),
        ('{"format": 2}', "has format 2; this version reads 1"),
        ('{"format": 1}', "is damaged: it lacks or misstates 'sets'"),
        ('{"format": 1, "sets": 3}', "is damaged: it lacks or misstates"),
        ('{"format": 1, "sets": {"../x": {"label": {"category": null, "snr_db": [null, null]},'
         ' "sha256": ""}}}', "a set of a bundle cannot be called '../x'"),
    ],
)  # fmt: skip
def test_an_unusable_index_is_refused_in_one_line(
    tmp_path: Path, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "bundle.json").write_text(content)
    with pytest.raises(StoreError, match=said) as error:
        Bundle.open(tmp_path)
    assert str(error.value).isprintable()


def test_every_entry_of_the_index_is_needed(tmp_path: Path) -> None:
    bundle(tmp_path / "b", trained_selector())
    whole = json.loads((tmp_path / "b" / "bundle.json").read_text())
    for key in whole:
        less = {k: v for k, v in whole.items() if k != key}
        (tmp_path / "b" / "bundle.json").write_text(json.dumps(less))
        with pytest.raises(StoreError):
            Bundle.open(tmp_path / "b")
