"""Noise made of the training data's own other speakers: whose voices, in which part, how told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.speech.audio import log_mel
from polyadapt.speech.clips import read_manifest
from polyadapt.speech.data import Manifest, Wants
from polyadapt.speech.scene_settings import Noise
from polyadapt.speech.scenes import Talkers, seeded
from polyadapt.speech.tokens import Tokens

pytestmark = [pytest.mark.slow, pytest.mark.in_an_empty_folder]

SPEAKERS = ("ann", "bob", "cid", "dan", "eve", "fay")
SECONDS = 0.4


def manifest(parts: dict[str, str], clips: int = 2) -> str:
    """A tone per speaker, by which a voice is told in any mixture: 200 Hz, 400 Hz, ..."""
    lines = ["path,text,speaker,split"]
    for speaker, part in parts.items():
        for number in range(clips):
            soundfile.write(f"{speaker}{number}.wav", voice(speaker).numpy(), 16_000)
            lines.append(f"{speaker}{number}.wav,one,{speaker},{part}")
    Path("m.csv").write_text("\n".join(lines) + "\n")
    return "m.csv"


def voice(speaker: str) -> Tensor:
    time = torch.arange(int(SECONDS * 16_000)) / 16_000
    return torch.sin(2 * torch.pi * 200 * (1 + SPEAKERS.index(speaker)) * time) / 10


def voices(sound: Tensor) -> set[str]:
    """Whose tones are in a sound."""
    power = torch.fft.rfft(sound[:6_400]).abs().square()  # 2.5 Hz a bin
    share = power / power.sum()
    return {s for i, s in enumerate(SPEAKERS) if share[75 + 80 * i : 86 + 80 * i].sum() > 1e-3}


def data(noise: Noise, **settings: Any) -> Manifest:
    made = Manifest("m.csv", noise=noise, **{"val_share": 0.0, **settings})
    made.wants = Wants(80, 0.6, Tokens(51864))
    made.setup()
    return made


HALVES = dict.fromkeys(("ann", "bob", "cid"), "train") | dict.fromkeys(("dan", "eve", "fay"), "val")
BABBLE = Noise(kinds=["babble"], own_speakers=True)


def test_a_parts_noise_is_of_its_own_speakers_and_never_of_the_clips_own() -> None:
    manifest(HALVES)
    made = data(BABBLE)
    for part, names in (("train", {"ann", "bob", "cid"}), ("val", {"dan", "eve", "fay"})):
        clips = made.clips(part)
        assert clips.variation.scenes is not None
        for clip in clips.clips:
            source = clips.variation.scenes["babble"].source
            assert isinstance(source, Talkers)
            assert voices(source.draw(6_400, seeded(0), clip.speaker)) == names - {clip.speaker}


def test_a_side_speaker_is_one_voice_and_babble_many() -> None:
    manifest(HALVES)
    clips = read_manifest("m.csv")["train"]
    found = Noise(kinds=["side", "babble"], own_speakers=True).scenes("train", 0, clips)
    assert list(found) == ["side", "babble"]
    heard = {
        kind: [voices(scene.source.draw(6_400, seeded(i), "ann")) for i in range(8)]
        for kind, scene in found.items()
        if scene.source is not None
    }
    assert all(heard["babble"][i] == {"bob", "cid"} for i in range(8))
    assert {next(iter(one)) for one in heard["side"]} == {"bob", "cid"}
    assert all(len(one) == 1 for one in heard["side"])


def test_clips_are_mixed_by_seed_epoch_and_position_and_validation_always_alike() -> None:
    manifest(HALVES)
    one, again, other = (data(BABBLE, seed=seed) for seed in (0, 0, 1))
    train, val = one.clips("train"), one.clips("val")
    assert train[3, 2].mel.equal(again.clips("train")[3, 2].mel)
    assert not train[3, 2].mel.equal(train[4, 2].mel)
    assert not train[3, 2].mel.equal(other.clips("train")[3, 2].mel)
    assert val[0].mel.equal(again.clips("val")[0].mel)
    assert not val[0].mel.equal(log_mel([val.clips[0].hear()], seconds=0.6)[0])


def test_the_mixture_holds_the_clip_and_the_others_at_the_snr_asked_for() -> None:
    manifest(HALVES)
    noise = Noise(kinds=["babble"], own_speakers=True, low=0, high=0)
    clips = read_manifest("m.csv")["train"]
    mixture = noise.added(noise.scenes("train", 0, clips), voice("ann"), seeded(0), "ann")
    assert voices(mixture) == {"ann", "bob", "cid"}
    added = mixture - voice("ann")
    ratio = float(added.square().mean() / voice("ann").square().mean())
    assert ratio == pytest.approx(1, abs=1e-3)


def test_the_other_kinds_stay_generated_or_of_the_folder() -> None:
    manifest(HALVES)
    clips = read_manifest("m.csv")["train"]
    own = Noise(own_speakers=True).scenes("train", 0, clips)
    assert list(own) == list(Noise().scenes("train", 0))
    assert {k for k, s in own.items() if isinstance(s.source, Talkers)} == {"babble", "side"}
    for number in range(3):
        Path("hum").mkdir(exist_ok=True)
        soundfile.write(f"hum/{number}.wav", voice("ann").numpy(), 16_000)
    mixed = Noise(folder="hum", own_speakers=True).scenes("train", 0, clips)
    assert list(mixed) == ["hum", "babble", "side"]


def test_the_label_says_that_the_voices_are_the_datas_own() -> None:
    wanted = {"category": "babble", "snr_db": [-5.0, 10.0], "convention": "full"}
    assert Noise(kinds=["babble"]).label() == wanted
    assert BABBLE.label() == {**wanted, "own_speakers": True}


@pytest.mark.parametrize(
    ("parts", "settings", "said"),
    [
        ({"ann": "train", "": "train"}, {}, r"own_speakers: 0.wav names no speaker"),
        ({"ann": "train"}, {}, r"two speakers in each part, train has \['ann'\]"),
        (HALVES | {"dan": "test"}, {}, r"two speakers in each part, test has \['dan'\]"),
        (
            dict.fromkeys(("ann", "bob"), "train"),
            {"val_share": 0.5, "seed": 1},
            r"'\w+' speaks in \w+ and in \w+; divide the clips with split_by: speaker",
        ),
    ],
)
def test_speakers_that_cannot_be_noise_are_refused_before_training(
    parts: dict[str, str], settings: dict[str, Any], said: str
) -> None:
    manifest({name: part for name, part in parts.items() if name})
    if "" in parts:
        soundfile.write("0.wav", voice("ann").numpy(), 16_000)
        Path("m.csv").write_text(Path("m.csv").read_text() + "0.wav,one,,train\n")
    with pytest.raises(AdaptError, match=said) as refused:
        data(BABBLE, **settings)
    assert "\n" not in str(refused.value)


def test_whole_speakers_split_off_are_disjoint_voices() -> None:
    manifest(dict.fromkeys(SPEAKERS, "train"))
    made = data(BABBLE, val_share=1 / 3, split_by="speaker")
    found = [{clip.speaker for clip in made.clips(part).clips} for part in ("train", "val")]
    assert [len(part) for part in found] == [4, 2]
    assert not found[0] & found[1]


def test_own_speakers_without_babble_or_a_side_speaker_are_refused() -> None:
    with pytest.raises(AdaptError, match="own_speakers is for babble and side, kinds are music"):
        Noise(kinds=["music"], own_speakers=True)
