"""Scenes: generated noise, recordings in folders, other speakers; nothing is in two parts."""

from __future__ import annotations

import io
import itertools
import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Generator, Tensor

from polyadapt.core import AdaptError
from polyadapt.speech.audio import SAMPLE_RATE
from polyadapt.speech.noise import Active, Full, Label
from polyadapt.speech.noise_folders import Recordings, folder_scenes, recordings
from polyadapt.speech.scenes import (
    KINDS,
    Between,
    Scene,
    Synthetic,
    Talkers,
    draw_any,
    overlay,
    seeded,
    split,
    synthetic_scenes,
)
from polyadapt.speech.synthetic import GENERATORS, brown, music, pink, side_speaker, white

CLIP = torch.randn(SAMPLE_RATE, generator=seeded("clip")) / 10


def kurtosis(signal: Tensor) -> float:
    centred = signal.double() - signal.double().mean()
    return float(centred.pow(4).mean() / centred.square().mean().square())


def slope(signal: Tensor) -> float:
    """Decibels per octave of the spectrum from 100 Hz to 6.4 kHz."""
    power = torch.fft.rfft(signal).abs().square()
    hertz = torch.fft.rfftfreq(signal.numel(), 1 / SAMPLE_RATE)
    octaves = [power[(hertz >= f) & (hertz < 2 * f)].mean() for f in 100 * 2.0 ** torch.arange(6)]
    return float(10 * torch.log10(octaves[-1] / octaves[0]) / 5)


@pytest.mark.parametrize("kind", GENERATORS)
def test_generated_noise_is_seeded_of_unit_power_and_as_long_as_asked(kind: str) -> None:
    made = [GENERATORS[kind](12_345, seeded(seed)) for seed in (0, 0, 1)]
    assert made[0].shape == (12_345,)
    assert made[0].dtype == torch.float32
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[0], made[2])
    assert float(made[0].square().mean()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", GENERATORS)
def test_generated_noise_may_be_a_single_sample_long(kind: str) -> None:
    assert GENERATORS[kind](1, seeded(0)).isfinite().all()


@pytest.mark.parametrize(("make", "wanted"), [(white, 0.0), (pink, -3.01), (brown, -6.02)])
def test_the_colours_fall_by_their_decibels_per_octave(
    make: Callable[[int, Generator], Tensor], wanted: float
) -> None:
    assert slope(make(4 * SAMPLE_RATE, seeded(0))) == pytest.approx(wanted, abs=0.4)


def test_speech_like_sound_opens_and_shuts_three_to_five_times_a_second() -> None:
    envelope = side_speaker(8 * SAMPLE_RATE, seeded(1)).abs().unfold(0, 160, 160).mean(1)
    spectrum = torch.fft.rfft(envelope - envelope.mean()).abs()
    hertz = torch.fft.rfftfreq(len(envelope), 0.01)
    assert 3 <= float(hertz[1:][spectrum[1:].argmax()]) <= 5.1


def test_babble_of_thirty_equal_signals_has_a_thirtieth_of_their_power_and_is_nearly_gaussian() -> (
    None
):
    parts = [torch.empty(60_000).exponential_(generator=seeded(i)) for i in range(30)]
    signs = [torch.randn(60_000, generator=seeded("sign", i)).sign() for i in range(30)]
    laplace = [a * b for a, b in zip(parts, signs, strict=True)]
    together = overlay([3.0 * signal for signal in laplace])
    assert float(together.square().mean()) == pytest.approx(1 / 30, rel=0.05)
    farthest = min(abs(kurtosis(signal) - 3) for signal in laplace)
    assert abs(kurtosis(together) - 3) < 0.2 < farthest


def test_a_babble_of_talkers_leaves_the_clips_own_speaker_out() -> None:
    clips = {name: [torch.full((100,), float(i))] for i, name in enumerate(("ann", "bob", "cid"))}
    clips["bob"] = [-torch.ones(100)]
    heard = Talkers(clips).draw(100, seeded(0), without="cid")  # ann's clip is silent
    torch.testing.assert_close(heard, -torch.ones(100))
    torch.testing.assert_close(Talkers(clips, 1).draw(40, seeded(0), without="bob"), torch.ones(40))
    with pytest.raises(AdaptError, match="no clip of a speaker other than 'ann'"):
        Talkers({"ann": [torch.ones(3)]}, 1).draw(40, seeded(0), without="ann")


def test_no_speaker_is_in_two_parts_of_real_speech(shared_data: Path) -> None:
    with zipfile.ZipFile(shared_data / "fsdd_small.zip") as archive:
        clips: dict[str, list[Tensor]] = {}
        for name in sorted(n for n in archive.namelist() if n.endswith("_0.wav")):
            samples, _ = soundfile.read(io.BytesIO(archive.read(name)), dtype="float32")
            clips.setdefault(name.split("_")[1], []).append(torch.from_numpy(samples))
    parts = split(clips, (4, 1, 1))
    assert [len(part) for part in parts] == [4, 1, 1]
    for one, other in itertools.combinations(parts, 2):
        assert not set(one) & set(other)
    babble = Talkers({name: clips[name] for name in parts[0]})
    heard = babble.draw(2 * SAMPLE_RATE, seeded(0))
    alone = [kurtosis(clip) for name in parts[0] for clip in clips[name]]
    assert kurtosis(heard) < sum(alone) / len(alone)
    mixture, label = Scene("babble", babble, (0.0,)).draw(clips[parts[1][0]][0], seeded(1))
    assert label == Label("babble", 0.0)
    assert mixture.isfinite().all()


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.98, 0.01, 0.01), (0.5, 0.5), (1,)])
@pytest.mark.parametrize("count", [3, 7, 20, 101])
def test_a_split_keeps_every_name_once_and_leaves_no_part_empty(
    count: int, shares: tuple[float, ...]
) -> None:
    names = [f"r{i:03d}" for i in range(count)]
    parts = split(reversed(names), shares)
    assert sorted(itertools.chain(*parts)) == names
    assert all(parts)
    assert parts == split(names, shares)
    if count == 20 and len(shares) == 3 and shares[0] == 0.8:
        assert [len(part) for part in parts] == [16, 2, 2]


def test_a_split_of_too_few_names_is_refused() -> None:
    with pytest.raises(AdaptError, match="2 names cannot be split into 3 parts"):
        split(["a", "b"])


def test_a_scene_draws_its_snr_from_a_range_or_a_list() -> None:
    ranged = Scene("white", Synthetic("white"), Between(-5, 5), Active())
    drawn = [ranged.draw(CLIP, seeded(i))[1].snr_db for i in range(20)]
    assert min(drawn) < -2 < 2 < max(drawn)
    assert all(-5 <= snr <= 5 for snr in drawn)
    listed = Scene("white", Synthetic("white"), (-5.0, 10.0))
    assert {listed.draw(CLIP, seeded(i))[1].snr_db for i in range(10)} == {-5.0, 10.0}


def test_the_snr_of_a_label_is_that_of_the_mixture() -> None:
    mixture, label = Scene("pink", Synthetic("pink"), Between(-5, 5)).draw(CLIP, seeded(3))
    added = mixture - CLIP  # quiet enough not to be scaled
    assert mixture.abs().max() < 1
    found = 10 * math.log10(Full().power(CLIP) / Full().power(added))
    assert found == pytest.approx(label.snr_db, abs=1e-3)


def test_clean_scenes_and_silent_clips_stay_as_they_are() -> None:
    assert Scene("clean").draw(CLIP, seeded(0))[1] == Label("clean")
    silence, label = Scene("music", Synthetic("music")).draw(torch.zeros(10), seeded(0))
    assert label == Label("clean")
    assert not silence.any()


class NowAndThen:
    """Silent until the third draw."""

    def __init__(self, silent: int = 2) -> None:
        self.silent = silent

    def draw(self, length: int, generator: Generator, without: str | None = None) -> Tensor:
        self.silent -= 1
        return torch.zeros(length) if self.silent >= 0 else torch.ones(length)


def test_silent_noise_is_drawn_again_but_not_for_ever() -> None:
    mixture, _ = Scene("taps", NowAndThen(), (0.0,)).draw(CLIP, seeded(0))
    assert not torch.equal(mixture, CLIP)
    with pytest.raises(AdaptError, match="'taps' gave silence 50 times"):
        Scene("taps", NowAndThen(1000)).draw(CLIP, seeded(0))


def test_any_scene_is_drawn_about_as_often_and_some_clips_stay_clean() -> None:
    scenes = synthetic_scenes(("white", "pink"))
    labels = [draw_any(scenes, CLIP[:400], seeded(i), clean_share=0.2)[1] for i in range(100)]
    counts = {c: sum(x.category == c for x in labels) for c in ("white", "pink", "clean")}
    assert sum(counts.values()) == 100
    assert all(8 <= count <= 60 for count in counts.values())
    with pytest.raises(AdaptError, match="no scene to draw from"):
        draw_any({}, CLIP, seeded(0))


def test_the_usual_synthetic_scenes_have_the_usual_kinds() -> None:
    assert tuple(synthetic_scenes(clean=True)) == (*KINDS, "clean")


def musan(folder: Path, recordings_each: int = 5) -> Path:
    """Music, speech and noise that are told apart by their level's sign and by their file."""
    for name in ("music/fma", "speech/librivox/deeper", "noise/free-sound"):
        (folder / name).mkdir(parents=True)
        for i in range(recordings_each):
            file = folder / name / f"{name[:5]}-{i}.wav"
            samples = music(SAMPLE_RATE // 2, seeded(name, i)) / 10
            soundfile.write(file, samples.numpy(), SAMPLE_RATE, subtype="FLOAT")
    (folder / "music" / "ANNOTATIONS").write_text("text beside the recordings is not audio")
    return folder


def test_musans_folders_become_scenes_split_by_recording(tmp_path: Path) -> None:
    parts = [folder_scenes(musan(tmp_path), "train")]
    parts += [folder_scenes(tmp_path, part) for part in ("validation", "test")]
    for scenes in parts:
        assert set(scenes) == {"babble", "side", "music", "noise"}
    for category in parts[0]:
        sources = [scenes[category].source for scenes in parts]
        files = [{*source.files} for source in sources if isinstance(source, Recordings)]
        assert [len(names) for names in files] == [3, 1, 1]
        assert len(set.union(*files)) == 5
    mixture, label = parts[0]["babble"].draw(CLIP, seeded(0))
    assert label.category == "babble"
    assert mixture.shape == CLIP.shape


def test_a_plain_folder_is_one_category_that_bears_its_name(tmp_path: Path) -> None:
    (tmp_path / "cafe").mkdir()
    for i in range(3):
        samples = white(SAMPLE_RATE // 4, seeded(i)).unsqueeze(1).expand(-1, 2) / 10
        soundfile.write(tmp_path / "cafe" / f"{i}.wav", samples.numpy(), SAMPLE_RATE // 2)
    mixture, label = folder_scenes(tmp_path / "cafe", "test")["cafe"].draw(CLIP, seeded(0))
    assert label.category == "cafe"
    assert mixture.isfinite().all()


def test_pieces_of_one_recording_stay_together(tmp_path: Path) -> None:
    for clip, piece in itertools.product(range(4), "AB"):
        soundfile.write(tmp_path / f"1-{clip}-{piece}-0.wav", CLIP[:400].numpy(), SAMPLE_RATE)
    found = recordings(tmp_path, lambda path: path.stem.split("-")[1])
    assert {name: len(files) for name, files in found.items()} == dict.fromkeys("0123", 2)


def test_only_a_part_of_a_long_recording_is_used_and_not_always_the_same(tmp_path: Path) -> None:
    ramp = torch.linspace(0.1, 0.9, 4 * SAMPLE_RATE)
    soundfile.write(tmp_path / "ramp.wav", ramp.numpy(), SAMPLE_RATE, subtype="FLOAT")
    source = Recordings({"ramp": [tmp_path / "ramp.wav"]})
    drawn = [source.draw(SAMPLE_RATE, seeded(i)) for i in range(2)]
    assert not torch.allclose(drawn[0], drawn[1])
    assert float(drawn[0].square().mean()) == pytest.approx(1, abs=1e-5)


def test_folders_without_recordings_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(AdaptError, match="holds no recording; known are"):
        folder_scenes(tmp_path)
    with pytest.raises(AdaptError, match="there is no folder of recordings"):
        folder_scenes(tmp_path / "absent")
    with pytest.raises(AdaptError, match="unknown part 'dev' of a noise folder"):
        folder_scenes(tmp_path, "dev")


def test_a_text_file_among_the_recordings_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("not audio")
    with pytest.raises(AdaptError, match=r"a\.wav is not audio"):
        Recordings({"a": [tmp_path / "a.wav"]}).draw(10, seeded(0))
