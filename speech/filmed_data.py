"""Data modules of filmed clips: what audio-visual sets are trained on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from ..core.batches import require_batches
from ..core.errors import AdaptError, require_word
from .audio import SAMPLE_RATE
from .av_data import FilmedClip, FilmedClips, FilmWants
from .av_plan import ALL_SNR, CLEAN_SHARE
from .clips import Clip, part_called, rows_of, word_of
from .data import SplitBy
from .mouth_crops import RATE
from .mouth_video import mouth_video
from .scene_settings import Noise
from .scenes import seeded, split
from .synthetic import speech_like

_KNOWN = ("audio", "video", "speaker", "split")

Parts = Mapping[str, Sequence[FilmedClip]]


class FilmedData(LightningDataModule, ABC):
    """Filmed clips in a training and a validation part, mixed with noise.

    noise: the scenes, SNRs and share of clean clips; without it those of arXiv 2502.01709, all
    generated kinds at -15 to 30 dB and 5 % clean. Training mixes every clip anew in each epoch,
    and crops, flips, erases and masks its pictures; validation always hears and sees the same.
    val_share: of the training clips, split off by `seed` where there is no such part; by `split_by`
    speaker, whole speakers are. num_workers: processes that prepare clips.

    `wants` is the fusion module's: within a trainer its task says it, else set it before asking for
    batches. Raises `AdaptError` for settings out of range and, before anything is trained, files
    that are missing, too long, or whose sound and video differ by over 0.2 s.
    """

    def __init__(
        self,
        *,
        batch_size: int = 16,
        val_share: float = 0.1,
        split_by: SplitBy = "clip",
        seed: int = 0,
        noise: Noise | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        require_batches(batch_size, num_workers)
        if not 0 <= val_share < 1:
            raise AdaptError(f"val_share={val_share} cannot be split off: from 0, below 1")
        require_word("split_by", split_by, SplitBy)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.val_share, self.split_by = val_share, split_by
        self.noise = noise or Noise(low=ALL_SNR.low, high=ALL_SNR.high, clean_share=CLEAN_SHARE)
        self.wants: FilmWants | None = None
        self._parts: dict[str, list[FilmedClip]] = {}

    @abstractmethod
    def read(self) -> Parts:
        """What is there, before anything is split off."""

    def setup(self, stage: str | None = None) -> None:
        task = None if self.trainer is None else self.trainer.lightning_module
        self.wants = getattr(task, "wants", None) or self.wants
        if self._parts:
            return
        parts = {part: list(clips) for part, clips in self.read().items()}
        if not parts.get("train"):
            raise AdaptError("there is no training clip: the parts are " + ", ".join(parts))
        if self.wants is not None:
            for clip in [clip for clips in parts.values() for clip in clips]:
                require_fit(clip, self.wants.seconds)
        if "val" not in parts:
            parts |= split_off(parts["train"], self.val_share, self.split_by, self.seed)
        self.noise.require_speakers({part: _voices(clips) for part, clips in parts.items()})
        self._parts = parts

    def clips(self, part: str) -> FilmedClips:
        """The clips of "train" or "val", as the fusion module gets them."""
        if self.wants is None:
            raise AdaptError("set data.wants first: the `wants` of an AudioVisualDistillation")
        return FilmedClips(
            self._parts[part],
            self.noise.scenes(part, self.seed, _voices(self._parts[part])),
            n_mels=self.wants.sizes.mels,
            seconds=self.wants.seconds,
            crop=self.wants.sizes.crop,
            clean_share=self.noise.clean_share,
            augment=part == "train",
            seed=self.seed,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self.clips("train").loader(self.batch_size, self.num_workers)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if not self._parts["val"]:
            return []
        return self.clips("val").loader(self.batch_size, self.num_workers)


class FilmedManifest(FilmedData):
    """Clips that a manifest names: CSV with the header `audio,video`, or JSON lines with such keys.

    `video` is a file of mouth crops at 25 Hz (.npy, .npz, or a video for OpenCV) or of features
    [f, d]. Further columns: `speaker`, and `split` (train or val; other parts are left out). Or a
    file for validation: `val`. Paths in a manifest begin at its folder.
    """

    def __init__(self, path: str, val: str | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.path, self.val = path, val

    def read(self) -> Parts:
        found = read_filmed(self.path)
        return found if self.val is None else {**found, "val": _all(read_filmed(self.val))}


class GeneratedFilms(FilmedData):
    """Speech-like sounds of `seconds` and mouths of `size` pixels that open with them.

    For trials without any data: see `speech_like` and `mouth_video` for what they are not.
    """

    def __init__(
        self, clips: int = 64, seconds: float = 2.0, size: int = 96, **common: Any
    ) -> None:
        super().__init__(**common)
        if clips < 1 or size < 1 or not 0.1 <= seconds <= 30:
            raise AdaptError(
                f"clips={clips}, size={size}, seconds={seconds}: from 1, from 1 and 0.1 to 30"
            )
        self.count, self.seconds, self.size = clips, seconds, size

    def read(self) -> Parts:
        samples = round(self.seconds * RATE) * SAMPLE_RATE // RATE
        return {"train": [self._clip(n, samples) for n in range(self.count)]}

    def _clip(self, number: int, samples: int) -> FilmedClip:
        hear = partial(_voice, (self.seed, "voice", number), samples)
        see = partial(_mouth, hear, (self.seed, "mouth", number), self.size)
        lasts = partial(_known, samples / SAMPLE_RATE, samples * RATE // SAMPLE_RATE)
        return FilmedClip(f"generated clip {number}", hear, see, f"voice {number}", lasts)


def _voice(place: tuple[int | str, ...], samples: int) -> Tensor:
    return speech_like(samples, seeded(*place)) / 10


def _mouth(hear: partial[Tensor], place: tuple[int | str, ...], size: int) -> Tensor:
    generator: Generator = seeded(*place)
    return mouth_video(hear(), generator, size)


def _known(seconds: float, pictures: int) -> tuple[float, int | None]:
    return seconds, pictures


def read_filmed(path: str | Path) -> dict[str, list[FilmedClip]]:
    """The filmed clips of a manifest by their part, as its column `split` says; else all train."""
    file = Path(path)
    found: dict[str, list[FilmedClip]] = {}
    for line, row in rows_of(file):
        where = f"{file}, line {line}"
        known = {key: word_of(row, key, where) for key in _KNOWN}
        audio, video = known["audio"], known["video"]
        if not audio or not video:
            raise AdaptError(f"{where}: audio and video are needed, found {sorted(map(str, row))}")
        clip = FilmedClip.of_files(
            file.parent / audio, file.parent / video, known["speaker"] or None
        )
        found.setdefault(part_called(known["split"] or "train", where), []).append(clip)
    if not found:
        raise AdaptError(f"the manifest {file} names no clip")
    return found


def _voices(clips: Sequence[FilmedClip]) -> list[Clip]:
    """Their sounds, as noise may be made of them."""
    return [
        Clip(clip.name, "", clip.hear, partial(_seconds, clip.hear), clip.speaker) for clip in clips
    ]


def _seconds(hear: Callable[[], Tensor]) -> float:
    return len(hear()) / SAMPLE_RATE


def _all(parts: Parts) -> list[FilmedClip]:
    return [clip for clips in parts.values() for clip in clips]


def require_fit(clip: FilmedClip, seconds: float) -> None:
    """Found at the start: a clip may come up after hours."""
    if clip.lasts is None:
        return
    heard, pictures = clip.lasts()
    if pictures is not None:
        heard = clip.shared(int(heard * 100), pictures) / RATE
    if heard > seconds:
        raise AdaptError(
            f"{clip.name} lasts {heard:.2f} s, the context is {seconds:g} s: cut the clip"
        )


def split_off(
    clips: Sequence[FilmedClip], share: float, by: SplitBy, seed: int
) -> dict[str, list[FilmedClip]]:
    """train and val: a share of the clips, or the clips of a share of the speakers."""
    if share == 0:
        return {"train": [*clips], "val": []}
    if by == "speaker" and (unnamed := [clip for clip in clips if clip.speaker is None]):
        raise AdaptError(f"split_by speaker: {unnamed[0].name} names no speaker")
    names = [f"{n:09}" if by == "clip" else str(c.speaker) for n, c in enumerate(clips)]
    kept = {*split(names, (1 - share, share), seed)[0]}
    parts: dict[str, list[FilmedClip]] = {"train": [], "val": []}
    for name, clip in zip(names, clips, strict=True):
        parts["train" if name in kept else "val"].append(clip)
    return parts
