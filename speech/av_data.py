"""Clips with the video of the speaker's mouth, mixed with noise: what an AVSR set is trained on.

What is drawn and when is the public code's (see `mouth_crops`); SpecAugment acts on the noisy mel
alone: one stretch of at most min(100, 0.3 t) frames and one band of at most 26.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.errors import AdaptError
from ..core.order import EpochAndPosition
from .audio import HOP, LONGEST, log_mel, read_audio
from .augmentation import SpecAugment
from .av_plan import CLEAN_SHARE
from .clips import seconds_of_file
from .fusion import FusionSizes, trimmed
from .mouth_crops import CROP, augmented, centred, normalised, pictures_in, read_film
from .scenes import Scene, draw_any, seeded
from .video_front import MELS_PER_FRAME

_SAMPLES = MELS_PER_FRAME * HOP  # 640 of one picture
NOISY_MEL = SpecAugment(bands=1, band_width=26, stretches=1, stretch_width=100, stretch_share=0.3)


class Pairs(NamedTuple):
    """A batch: log-mels [b, n_mels, t] of the mixtures and of the clean clips, video, lengths.

    The video is that of the first frames: [b, 1, f, h, w] or features [b, f, d] with 4 f <= t.
    `frames` [b] are each clip's own, in frames of the mel.
    """

    noisy: Tensor
    clean: Tensor
    video: Tensor
    frames: Tensor


@dataclass(frozen=True)
class FilmedClip:
    """A recording and its mouth crops uint8 [f, h, w], or features [f, d], at 25 Hz.

    `lasts`: how many seconds it sounds and how many pictures it has, as far as that is known
    without reading it all.
    """

    name: str
    hear: Callable[[], Tensor]
    see: Callable[[], Tensor]
    speaker: str | None = None
    lasts: Callable[[], tuple[float, int | None]] | None = None

    @classmethod
    def of_files(
        cls, audio: str | Path, video: str | Path, speaker: str | None = None
    ) -> FilmedClip:
        """A sound file, and what `read_film` reads."""
        hear, see = partial(read_audio, audio), partial(read_film, video)
        return cls(str(audio), hear, see, speaker, partial(_lengths, Path(audio), video))

    def both(self) -> tuple[Tensor, Tensor]:
        """Sound [n] and pictures of the time that both have; over 0.2 s apart is refused."""
        sound, pictures = self.hear(), self.see()
        frames = self.shared(len(sound) // HOP, len(pictures))
        return sound[: _SAMPLES * frames], pictures[:frames]

    def shared(self, mel_frames: int, pictures: int) -> int:
        """How many pictures of time sound and video share."""
        try:
            return len(trimmed(torch.empty(0, mel_frames), torch.empty(pictures, 0))[1])
        except AdaptError as error:
            raise AdaptError(f"{self.name}: {error}") from error


def _lengths(audio: Path, video: str | Path) -> tuple[float, int | None]:
    return seconds_of_file(audio), pictures_in(video)


@dataclass(frozen=True)
class FilmWants:
    """What a fusion module and its Whisper want filmed clips to be: a task says it to its data."""

    sizes: FusionSizes
    seconds: float


class FilmedClips(Dataset[Pairs]):
    """Filmed clips mixed with the noise of `scenes`, asked for by (epoch, position).

    Each sample is a batch of one; `batch` joins them. What is drawn is a function of (seed, epoch,
    position). `augment=False`, for validation: the middle of the pictures, no mask, the same noise
    in every epoch, which training has in none. `seconds` is the context that Whisper gets, `crop`
    that of the fusion module.

    `AdaptError` for a clip whose sound and video differ by over 0.2 s, and one that is too long.
    """

    def __init__(
        self,
        clips: Sequence[FilmedClip],
        scenes: Mapping[str, Scene],
        *,
        n_mels: int = 80,
        seconds: float = LONGEST,
        crop: int = CROP,
        clean_share: float = CLEAN_SHARE,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        self.clips, self.scenes = clips, scenes
        self.n_mels, self.seconds, self.crop = n_mels, seconds, crop
        self.clean_share, self.augment, self.seed = clean_share, augment, seed

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: int | tuple[int, int]) -> Pairs:
        epoch, position = (0, key) if isinstance(key, int) else key
        clip = self.clips[position]
        generator = seeded(self.seed, epoch if self.augment else -1, position)
        sound, pictures = clip.both()
        mixture, _ = draw_any(self.scenes, sound, generator, clip.speaker, self.clean_share)
        noisy, clean = log_mel([mixture, sound], self.n_mels, self.seconds)
        frames = MELS_PER_FRAME * len(pictures)
        if self.augment:
            noisy = NOISY_MEL(noisy, frames, generator)
        if self.augment and pictures.ndim == 3:
            video = augmented(normalised(pictures), generator, self.crop)
        else:
            video = shown(pictures, self.crop)
        return Pairs(noisy[None], clean[None], video[None], torch.tensor([frames]))

    @staticmethod
    def batch(samples: Sequence[Pairs]) -> Pairs:
        """One batch; shorter videos are filled up with zeros (the mean picture)."""
        longest = max(int(s.frames) for s in samples) // MELS_PER_FRAME
        video = torch.cat([_filled(s.video, longest) for s in samples])
        noisy, clean, frames = (
            torch.cat([getattr(s, name) for s in samples]) for name in ("noisy", "clean", "frames")
        )
        return Pairs(noisy, clean, video, frames)

    def loader(self, batch_size: int, num_workers: int = 0) -> DataLoader[Any]:
        """Batches, in another order every epoch when `augment` is on."""
        order = EpochAndPosition(len(self), self.seed, shuffle=self.augment)
        return DataLoader(
            self,
            batch_size,
            sampler=order,
            generator=order.generator,
            num_workers=num_workers,
            collate_fn=self.batch,
        )


def shown(pictures: Tensor, crop: int) -> Tensor:
    """Pictures as a network gets them: the middle [1, f, crop, crop] of crops; features [f, d].

    >>> shown(torch.zeros(3, 96, 96, dtype=torch.uint8), 88).shape
    torch.Size([1, 3, 88, 88])
    """
    return centred(normalised(pictures), crop) if pictures.ndim == 3 else pictures.float()


def _filled(video: Tensor, frames: int) -> Tensor:
    """[1, 1, f, h, w] or [1, f, d] -> with so many frames."""
    pictures = video.ndim == 5
    missing = frames - video.shape[2 if pictures else 1]
    return F.pad(video, (0, 0, 0, 0, 0, missing) if pictures else (0, 0, 0, missing))
