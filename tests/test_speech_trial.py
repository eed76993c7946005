"""The parts of making a bundle: what sets are for, mixtures to compare them on, and the trial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from polyadapt.core.activation import current
from polyadapt.core.drawer import drawer_of
from polyadapt.speech.backbones import OpenAIWhisper
from polyadapt.speech.bundle_record import Hearing
from polyadapt.speech.clips import Clip
from polyadapt.speech.data import Manifest
from polyadapt.speech.decision import Costs
from polyadapt.speech.decoding import Decoding
from polyadapt.speech.description import Description
from polyadapt.speech.mixtures import grid
from polyadapt.speech.model import Speech
from polyadapt.speech.noise import CLEAN, Active
from polyadapt.speech.purpose import Purpose, levels, noise_for, scenarios
from polyadapt.speech.scene_settings import Noise
from polyadapt.speech.scenes import Scene, synthetic_scenes
from polyadapt.speech.selector import Selector
from polyadapt.speech.selector_training import examples
from polyadapt.speech.trial import tried
from polyadapt.tests.speech_bundles import CLASSES, lora
from polyadapt.tests.speech_cases import save_clip, save_manifest
from polyadapt.tests.speech_models import tiny_speech

pytestmark = pytest.mark.slow  # whole runs


def clip(number: int, text: str = "cat dog") -> Clip:
    sound = torch.sin(torch.arange(6_400) * (0.1 + number / 50)) / 4
    return Clip(f"c{number}", text, lambda: sound, lambda: 0.4, f"s{number}")


def test_a_label_of_noise_settings_is_read_as_it_was_meant() -> None:
    noise = Noise(kinds=["babble"], own_speakers=True, low=0, high=5, convention="active-40")
    assert Purpose.from_json(noise.label()) == Purpose(("babble",), 0, 5, Active(40.0), True)
    assert Purpose.from_json({"category": "white"}) == Purpose(("white",))
    assert Purpose.from_json({"snr_db": 5}) == Purpose((), 5, 5)


def test_a_label_of_a_folder_names_its_noise_and_not_its_place(tmp_path: Path) -> None:
    for number in range(3):
        save_clip(tmp_path / f"hum/{number}.wav", 0.5, number)
    label = Noise(folder=str(tmp_path / "hum"), own_speakers=True).label()
    assert label["category"] == "hum+babble+side"


def test_the_noise_of_a_bundle_is_all_that_its_sets_are_for() -> None:
    sets = [Purpose(("music",), 0, 5), Purpose((CLEAN,)), Purpose(("pink", "music"), 5, 12)]
    noise = noise_for(sets)
    assert (noise.kinds, noise.low, noise.high) == (["music", "pink"], -5, 12)
    assert not noise.own_speakers
    assert noise_for([Purpose(("side",), 0, 5, own_speakers=True)]).own_speakers
    anything = noise_for([Purpose((), -9, 1)])
    assert (anything.low, anything.high) == (-9, 1)
    assert {"babble", "music", "engine"} <= {*(anything.kinds or ())}


@pytest.mark.parametrize(
    "sets",
    [
        [Purpose(("a",), -5, 10)],
        [Purpose(("a",), -5, 3), Purpose(("a",), -3, 10), Purpose(("a", "b"), -5, 10)],
        [Purpose(("a",), high=5), Purpose(("b",), 5)],
        [Purpose(("a",), 0, 0)],
        [Purpose(("a",), 20), Purpose(("a",), 4, 4.5)],
    ],
)
def test_every_scenario_is_measured_and_every_snr_has_one(sets: list[Purpose]) -> None:
    columns, tested = scenarios(["a", "b", CLEAN], sets), levels(sets)
    Costs(("none",), columns, ((1.0,) * len(columns),))  # refuses a gap and an overlap
    for column in columns:
        if column.category != CLEAN:
            assert any(column.low <= level < column.high for level in tested)
    assert next(c for c in columns if c.category == CLEAN).high == math.inf


def test_few_clips_are_heard_at_every_level_in_every_noise() -> None:
    scenes = {**synthetic_scenes(("white", "music")), CLEAN: Scene(CLEAN)}
    made = grid([clip(0), clip(1), clip(2)], scenes, (0.0, 3.0, 6.0, 9.0), ("val",))
    labels = [mixture.draw()[1] for mixture in made]
    for category in ("white", "music"):
        heard = [label.snr_db for label in labels if label.category == category]
        assert len(heard) == 6
        assert {*heard} == {0.0, 3.0, 6.0, 9.0}
    assert [label.snr_db for label in labels if label.category == CLEAN] == [math.inf] * 3
    assert made[0].draw()[0].equal(made[0].draw()[0])
    assert grid([], scenes, (0.0,), ("val",)) == []


def test_a_set_hears_in_its_own_context_with_its_own_adapters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speech, asked = tiny_speech(), []

    def decode(self: Speech, mel: Tensor, how: Decoding) -> list[Any]:
        asked.append((current(drawer_of(self.model)).names, tuple(mel.shape), how.longest))
        texts = ["cat dog", "cat", "", "cat dog bird"] if asked[-1][0] else ["cat dog"] * 4
        return [SimpleNamespace(text=text) for text in texts[: len(mel)]]

    monkeypatch.setattr(Speech, "decode", decode)
    lora(speech, "hiss")
    about = Description(OpenAIWhisper(name="tiny.pt"), 0.6, "en", "transcribe", False, longest=3)
    mixtures = grid([clip(n) for n in range(3)], synthetic_scenes(("white",)), (0, 3, 5, 7), ())
    said: list[str] = []
    found = tried(
        speech,
        {"hiss": about},
        mixtures,
        (Selector(CLASSES).eval(), Hearing()),
        batch=4,
        told=said.append,
    )
    assert asked == [
        ((), (4, 80, 3000), None),
        (("hiss",), (4, 80, 60), 3),
        ((), (2, 80, 3000), None),
        (("hiss",), (2, 80, 60), 3),
    ]
    assert found.errors == {"none": [0] * 6, "hiss": [0, 1, 2, 1, 0, 1]}
    assert found.words == [2] * 6
    assert found.clips == ["c0", "c0", "c1", "c1", "c2", "c2"]
    assert [label.snr_db for label in found.labels] == [0, 7, 3, 0, 5, 3]
    assert all(heard is not None and len(heard[0]) == 2 for heard in found.heard)
    assert said[-1] == "6 of 6 mixtures are transcribed"


class Overheard:
    """A source that notes whose clip it is drawn for."""

    def __init__(self) -> None:
        self.without: list[str | None] = []

    def draw(self, length: int, generator: Generator, without: str | None = None) -> Tensor:
        self.without.append(without)
        return torch.randn(length, generator=generator)


def test_a_selector_never_hears_a_clips_speaker_in_its_noise() -> None:
    source = Overheard()
    given: Sequence[Clip] = [clip(0), clip(1)]
    examples({"babble": Scene("babble", source)}, given, 12, seconds=0.4)
    assert {*source.without} == {"s0", "s1"}
    loud = [c.hear() for c in given]
    one = examples({"babble": Scene("babble", Overheard())}, loud, 4, seconds=0.4)
    assert one.mel.equal(examples({"babble": Scene("babble", source)}, given, 4, 0.4).mel)


def test_several_manifests_are_as_one(tmp_path: Path) -> None:
    first = save_manifest(str(tmp_path / "a/m.csv"), count=6)
    second = save_manifest(str(tmp_path / "b/m.csv"), count=6)
    parts = Manifest([first, second]).read()
    assert {part: len(clips) for part, clips in parts.items()} == {"train": 10, "test": 2}
    forced = Manifest([first], val=second).read()
    assert {part: len(clips) for part, clips in forced.items()} == {"train": 6, "val": 6}
