"""Mouth crops and filmed clips: reading, augmenting, mixing; generated mouths."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import soundfile
import torch
from torch import Generator, Tensor

from polyadapt.core import AdaptError
from polyadapt.speech import mouth_crops
from polyadapt.speech.audio import log_mel
from polyadapt.speech.av_data import FilmedClip, FilmedClips
from polyadapt.speech.mouth_crops import (
    DEVIATION,
    MEAN,
    at_25_hz,
    augmented,
    centred,
    normalised,
    read_crops,
)
from polyadapt.speech.mouth_video import envelope, mouth_video
from polyadapt.speech.scenes import Between, Scene, Synthetic
from polyadapt.speech.synthetic import speech_like


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


# Reading


def test_arrays_of_mouth_crops_come_back_as_they_are(tmp_path: Path) -> None:
    crops = np.random.default_rng(0).integers(0, 256, (5, 90, 92), dtype=np.uint8)
    np.save(tmp_path / "a.npy", crops)
    np.savez(tmp_path / "b.npz", video=crops, rate=np.array(25))
    np.savez(tmp_path / "c.npz", mouth=crops)
    np.save(tmp_path / "d.npy", (crops / 255).astype(np.float32))
    for name in ("a.npy", "b.npz", "c.npz", "d.npy"):
        found = read_crops(tmp_path / name)
        assert found.dtype == torch.uint8
        assert np.array_equal(found.numpy(), crops), name


def _film(path: Path, rate: float, levels: list[int]) -> None:
    film = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), rate, (96, 96))
    for level in levels:
        film.write(np.full((96, 96, 3), level, np.uint8))
    film.release()


def test_a_video_is_read_at_25_pictures_per_second(tmp_path: Path) -> None:
    _film(tmp_path / "slow.avi", 12.5, [50, 200])
    _film(tmp_path / "fast.avi", 50.0, [10, 20, 90, 100, 190, 200])
    slow, fast = (read_crops(tmp_path / name).float().mean((1, 2)) for name in SPEEDS)
    assert slow.tolist() == pytest.approx([50, 50, 200, 200], abs=3)
    assert fast.tolist() == pytest.approx([10, 90, 190], abs=3)
    assert at_25_hz(60, 30.0) == [int(n * 1.2) for n in range(50)]


SPEEDS = ("slow.avi", "fast.avi")


def _array(values: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, values)


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("a.npy", lambda path: None, "no such file"),
        ("a.npy", lambda path: path.write_text("mouth"), "cannot be read as an array"),
        ("a.npy", _array(np.zeros((5, 88), np.uint8)), r"holds \[5, 88\]"),
        ("a.npy", _array(np.zeros((0, 88, 88), np.uint8)), r"holds \[0, 88, 88\]"),
        ("a.npy", _array(np.zeros((5, 88, 88, 3), np.uint8)), "are grey"),
        ("a.npy", _array(np.full((5, 88, 88), 1.5)), "floats from 0 to 1"),
        ("a.npy", _array(np.full((5, 88, 88), np.nan)), "floats from 0 to 1"),
        ("a.npy", _array(np.zeros((5, 88, 88), np.int64)), "not int64"),
        ("a.npy", _array(np.array([None])), "cannot be read as an array"),
        ("a.npz", lambda path: np.savez(path, a=np.zeros(1), b=np.zeros(1)), "'video'"),
        ("a.mp4", lambda path: path.write_text("mouth"), "cannot be read as a video"),
    ],
)
def test_what_is_no_file_of_mouth_crops_is_refused_in_one_line(
    name: str, write: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(AdaptError, match=words) as refusal:
        read_crops(tmp_path / name)
    assert "\n" not in str(refusal.value)
    assert name in str(refusal.value)


def test_without_opencv_a_video_is_refused_and_arrays_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.mp4").touch()
    np.save(tmp_path / "a.npy", np.zeros((5, 88, 88), np.uint8))
    find = importlib.util.find_spec
    monkeypatch.setattr(mouth_crops, "find_spec", lambda n: None if n == "cv2" else find(n))
    with pytest.raises(AdaptError, match="OpenCV, which is not installed"):
        read_crops(tmp_path / "a.mp4")
    assert len(read_crops(tmp_path / "a.npy")) == 5


# What a network gets


def test_grey_values_get_the_usual_mean_and_deviation() -> None:
    video = normalised(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    assert video.shape == (1, 1, 1, 2)
    assert video.flatten().tolist() == pytest.approx([-MEAN / DEVIATION, (1 - MEAN) / DEVIATION])


def test_the_middle_is_cut_out() -> None:
    crops = torch.arange(96 * 98).view(1, 96, 98)
    assert torch.equal(centred(crops), crops[:, 4:92, 5:93])
    assert torch.equal(centred(crops, 96), crops[:, :, 1:97])
    with pytest.raises(AdaptError, match="96 x 98 pixels: at least 97 x 97"):
        centred(crops, 97)


def _marked(frames: int = 100) -> Tensor:
    """Every pixel's place as its value; no pixel is 0."""
    return (torch.arange(96.0 * 96) + 1).view(1, 1, 96, 96).expand(1, frames, 96, 96)


def test_one_place_and_one_flip_for_the_whole_clip() -> None:
    places, flips, clips = set(), 0, 0
    for seed in range(200):
        cut = augmented(_marked(2), seeded(seed))
        kept = [p for p in cut[0] if p.any() and (p != 0).all()]
        if not kept:
            continue
        first = kept[0]
        assert all(torch.equal(p, first) for p in kept)
        flipped = bool(first[0, 0] > first[0, 1])
        corner = int(first[0, -1 if flipped else 0]) - 1
        places.add((corner // 96, corner % 96))
        flips, clips = flips + flipped, clips + 1
    assert {y for y, _ in places} == {x for _, x in places} == set(range(9))
    assert flips / clips == pytest.approx(0.5, abs=0.1)


def test_half_of_the_pictures_lose_a_rectangle_and_each_second_up_to_nine() -> None:
    erased, masked, sides = 0, [], []
    for seed in range(40):
        holes = augmented(_marked(), seeded(seed))[0] == 0
        gone = holes.all((1, 2))
        masked += [int(second.sum()) for second in gone.split(25)]
        for hole in holes[~gone]:
            if hole.any():
                erased += 1
                rows, columns = hole.any(1).sum(), hole.any(0).sum()
                assert rows * columns == hole.sum()  # a rectangle
                sides.append((int(rows), int(columns)))
    assert erased / (4000 - sum(masked)) == pytest.approx(0.5, abs=0.05)
    assert max(masked) == 9
    assert sum(masked) / len(masked) == pytest.approx(4.5, abs=0.7)
    areas = [math.sqrt(a * b) for a, b in sides]
    assert min(areas) < 3
    assert 28 < max(areas) <= 31
    assert max(max(a / b, b / a) for a, b in sides if min(a, b) > 8) < 3.9


def test_the_same_generator_draws_the_same() -> None:
    assert torch.equal(augmented(_marked(), seeded(3)), augmented(_marked(), seeded(3)))


# Generated mouths


def test_a_generated_mouth_opens_with_the_voice() -> None:
    voice = speech_like(32_000, seeded(1))
    pictures = mouth_video(voice, seeded(2))
    assert pictures.shape == (50, 88, 88)
    assert pictures.dtype == torch.uint8
    darkness = -pictures.float().mean((1, 2))
    seen = torch.corrcoef(torch.stack([darkness, envelope(voice)]))[0, 1]
    assert seen > 0.95


def test_silence_is_a_closed_mouth() -> None:
    dark = [mouth_video(t, seeded()) < 100 for t in (torch.zeros(6_400), torch.ones(6_400))]
    assert dark[0].float().mean() < 0.06  # a line
    assert dark[1].float().mean() > 0.2


# Filmed clips


def _clip(seconds: float = 1.0, frames: int | None = None, seed: int = 0) -> FilmedClip:
    voice = speech_like(int(16_000 * seconds), seeded(seed)) / 10
    pictures = mouth_video(voice, seeded(seed), 96)
    pictures = pictures if frames is None else pictures[:1].expand(frames, -1, -1)
    return FilmedClip(f"clip {seed}", lambda: voice, lambda: pictures, "ann")


SCENES = {"white": Scene("white", Synthetic("white"), Between(-5, -5))}


def test_a_sample_is_the_mixture_the_clean_clip_and_the_video() -> None:
    clips = FilmedClips([_clip()], SCENES, seconds=1.5, augment=False, clean_share=0)
    noisy, clean, video, frames = clips[0]
    assert noisy.shape == clean.shape == (1, 80, 150)
    assert video.shape == (1, 1, 25, 88, 88)
    assert frames.tolist() == [100]
    assert torch.equal(clean, log_mel([clips.clips[0].hear()], seconds=1.5))
    assert not torch.allclose(noisy[..., :100], clean[..., :100], atol=0.3)
    assert torch.equal(noisy, clips[(7, 0)].noisy)  # validation hears the same every time


def test_the_share_of_clean_clips_is_kept_clean() -> None:
    clips = FilmedClips([_clip()], SCENES, seconds=1.0, augment=False, clean_share=1.0)
    assert torch.equal(clips[0].noisy, clips[0].clean)


def test_what_is_drawn_belongs_to_seed_epoch_and_position() -> None:
    clips = FilmedClips([_clip(seed=0), _clip(seed=1)], SCENES, seconds=1.0, seed=4)
    first = clips[(0, 1)]
    clips[(0, 0)]
    again, later = clips[(0, 1)], clips[(1, 1)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.noisy, later.noisy)
    assert not torch.equal(first.video, later.video)
    assert torch.equal(first.clean, later.clean)


def test_a_batch_fills_up_the_shorter_video() -> None:
    features = FilmedClip("f", lambda: torch.ones(8_000) / 9, lambda: torch.ones(12, 6))
    longer = FilmedClip("g", lambda: torch.ones(16_000) / 9, lambda: torch.ones(25, 6))
    clips = FilmedClips([features, longer], SCENES, seconds=1.0)
    batch = clips.batch([clips[0], clips[1]])
    assert batch.video.shape == (2, 25, 6)
    assert batch.video.sum((1, 2)).tolist() == [72, 150]
    assert batch.frames.tolist() == [48, 100]
    assert batch.noisy.shape == (2, 80, 100)
    pictures = FilmedClips([_clip(0.6), _clip(1.0)], SCENES, seconds=1.0, augment=False)
    assert pictures.batch([pictures[0], pictures[1]]).video.shape == (2, 1, 25, 88, 88)


def test_sound_and_video_are_cut_to_the_time_that_both_have() -> None:
    clips = FilmedClips([_clip(1.0, frames=22)], SCENES, seconds=1.0, augment=False)
    assert clips[0].frames.tolist() == [88]
    assert torch.equal(clips[0].clean, log_mel([clips.clips[0].hear()[: 88 * 160]], seconds=1.0))
    with pytest.raises(AdaptError, match=r"clip 0: the mel's 100 frames are 25 video frames"):
        FilmedClips([_clip(1.0, frames=31)], SCENES, seconds=1.0)[0]


def test_the_loader_shuffles_in_training_and_reads_files(tmp_path: Path) -> None:
    made = []
    for n in range(6):
        voice = speech_like(6_400, seeded(n)) / 10
        soundfile.write(tmp_path / f"{n}.wav", voice.numpy(), 16_000)
        np.save(tmp_path / f"{n}.npy", mouth_video(voice, seeded(n)).numpy())
        made.append(FilmedClip.of_files(tmp_path / f"{n}.wav", tmp_path / f"{n}.npy"))
    train = FilmedClips(made, SCENES, seconds=0.4)
    loader = train.loader(2)
    loader.sampler.set_epoch(0)  # type: ignore[attr-defined]
    first = [batch.clean for batch in loader]
    loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    second = [batch.clean for batch in loader]
    assert [len(clean) for clean in first] == [2, 2, 2]
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    still = FilmedClips(made, SCENES, seconds=0.4, augment=False).loader(6)
    (batch,) = still
    wanted = torch.cat([train[n].clean for n in range(6)])
    assert torch.equal(batch.clean, wanted)
