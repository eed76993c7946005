"""How a clip is varied in training: speed, SpecAugment; every draw from a generator of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Generator, Tensor

from ..core.errors import AdaptError
from .audio import HOP, SAMPLE_RATE


@dataclass(frozen=True, kw_only=True)
class SpecAugment:
    """Bands and stretches of a log-mel spectrogram, masked (arXiv 1904.08779, without warping).

    `bands` masks of 0 to `band_width` mel bands, `stretches` masks of 0 to `stretch_width` frames
    (10 ms each), the latter within the clip and never more than `stretch_share` of it each. What is
    masked gets the mean of the clip, as in the paper, whose spectrograms have the mean 0. The
    defaults are the paper's policy LD with a share of 0.2; it has 80 mel bands, too.

    >>> masked = SpecAugment(bands=1, stretches=0)(
    ...     torch.rand(80, 6), frames=6, generator=Generator().manual_seed(0)
    ... )
    >>> sum(row.unique().numel() == 1 for row in masked)  # bands that are one number
    4
    """

    bands: int = 2
    band_width: int = 27
    stretches: int = 2
    stretch_width: int = 100
    stretch_share: float = 0.2

    def __post_init__(self) -> None:
        numbers = (self.bands, self.band_width, self.stretches, self.stretch_width)
        if min(numbers) < 0 or not 0 <= self.stretch_share <= 1:
            raise AdaptError(f"{self} is not allowed: numbers from 0, and a share from 0 to 1")

    def __call__(self, mel: Tensor, frames: int, generator: Generator) -> Tensor:
        """A masked copy of [n_mels, t]; the clip is its first `frames`, the rest is padding."""
        frames = min(frames, mel.shape[1])
        masked, fill = mel.clone(), mel[:, :frames].mean()
        for _ in range(self.bands):
            start, end = _drawn(min(self.band_width, len(mel)), len(mel), generator)
            masked[start:end, :frames] = fill
        widest = min(self.stretch_width, int(self.stretch_share * frames))
        for _ in range(self.stretches):
            start, end = _drawn(widest, frames, generator)
            masked[:, start:end] = fill
        return masked


def _drawn(widest: int, length: int, generator: Generator) -> tuple[int, int]:
    """A width of 0 to `widest`, then where it starts."""
    width = int(torch.randint(widest + 1, (), generator=generator))
    start = int(torch.randint(length - width + 1, (), generator=generator))
    return start, start + width


def drawn_speed(
    speeds: Sequence[float], clip: Tensor, seconds: float, generator: Generator
) -> Tensor:
    """The clip [n] at one of the speeds, drawn among those at which it still fits `seconds`.

    None fits: the clip as it is.
    """
    room = seconds * SAMPLE_RATE
    fitting = [speed for speed in speeds if len(clip) / speed <= room]
    if not fitting:
        return clip
    speed = fitting[int(torch.randint(len(fitting), (), generator=generator))]
    return at_speed(clip, speed)[: int(room)]  # the resampler may round a sample up


def at_speed(clip: Tensor, speed: float) -> Tensor:
    """A clip [n] -> [n / speed], played faster or slower: the pitch moves with it.

    >>> at_speed(torch.zeros(16_000), 1.25).shape
    torch.Size([12800])
    """
    if speed == 1:
        return clip
    import soxr

    ratio = Fraction(speed).limit_denominator(1000)
    return torch.from_numpy(soxr.resample(clip.numpy(), ratio.numerator, ratio.denominator))


def require_speeds(speeds: Sequence[float]) -> None:
    """Speeds are factors near 1."""
    if not speeds or not all(0.5 <= speed <= 2 for speed in speeds):
        raise AdaptError(f"speeds={list(speeds)} is not allowed: factors from 0.5 to 2")


def frames_in(clip: Tensor) -> int:
    """Frames of the spectrogram that hold a clip [n]."""
    return -(-len(clip) // HOP)
