"""Filmed recordings in transcription: the pictures that belong to a stretch of the sound."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from torch import Tensor

from ..core.errors import AdaptError
from .audio import HOP, SAMPLE_RATE
from .av_data import FilmedClip, shown
from .fusion import FusionSizes
from .mouth_crops import RATE

_SAMPLES = SAMPLE_RATE // RATE  # of one picture


class Film:
    """Sound and pictures of a filmed clip, read as a whole when either is first asked for.

    Raises `AdaptError` then, for files that cannot be read, or that last over 0.2 s apart.

    >>> import torch
    >>> film = Film(FilmedClip("a", lambda: torch.zeros(32_000), lambda: torch.zeros(50, 6)))
    >>> next(film.sound()).shape, film.during(16_000, 6_400, FusionSizes(features=6)).shape
    (torch.Size([32000]), torch.Size([10, 6]))
    """

    def __init__(self, clip: FilmedClip) -> None:
        self.clip = clip

    def sound(self) -> Iterator[Tensor]:
        """The samples [n], in one piece."""
        yield self._read[0]

    def during(self, start: int, samples: int, sizes: FusionSizes) -> Tensor | None:
        """The pictures of so many samples from `start` on, as the fusion module gets them.

        [1, f, crop, crop] or features [f, d] with f <= samples / 640; None where the video is over.
        """
        pictures = self._read[1]
        self._require(pictures, sizes)
        first = round(start / _SAMPLES)
        found = pictures[first : first + samples // _SAMPLES]
        return shown(found, sizes.crop) if len(found) else None

    @cached_property
    def _read(self) -> tuple[Tensor, Tensor]:
        sound, pictures = self.clip.hear(), self.clip.see()
        self.clip.shared(len(sound) // HOP, len(pictures))
        return sound, pictures

    def _require(self, pictures: Tensor, sizes: FusionSizes) -> None:
        wanted = "mouth crops [f, h, w]" if sizes.features is None else f"[f, {sizes.features}]"
        fits = (
            pictures.ndim == 3
            if sizes.features is None
            else pictures.ndim == 2 and pictures.shape[1] == sizes.features
        )
        if not fits:
            raise AdaptError(
                f"the video of {self.clip.name} is {list(pictures.shape)}, the set takes {wanted}"
            )
