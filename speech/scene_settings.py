"""The noise that a data module adds to its clips, as plain settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from ..core.errors import AdaptError
from .noise import convention_named
from .noise_folders import folder_scenes
from .scenes import KINDS, Between, Scene, draw_any, synthetic_scenes

_PARTS = {"train": "train", "val": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Scenes that clips are mixed with: generated `kinds`, or recordings of a `folder`.

    A clip gets one of the scenes, and an SNR from `low` to `high` dB in the `convention` (full,
    active, active-D). `clean_share` of the clips stay clean. The recordings of a folder (of MUSAN's
    layout, or one category) are divided 80/10/10 among training, validation and test.
    """

    kinds: list[str] | None = None
    folder: str | None = None
    low: float = -5.0
    high: float = 10.0
    convention: str = "full"
    clean_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.clean_share <= 1:
            raise AdaptError(f"noise: clean_share={self.clean_share} is not a share from 0 to 1")
        if self.kinds is not None and not self.kinds:
            raise AdaptError("noise: kinds=[] names no noise; null takes all kinds")
        convention_named(self.convention)
        Between(self.low, self.high)
        if self.folder is None:
            synthetic_scenes(self.kinds or KINDS)  # refuses a kind that there is not

    def scenes(self, part: str, seed: int) -> dict[str, Scene]:
        """The scenes of a part: train, val or test."""
        snr, convention = Between(self.low, self.high), convention_named(self.convention)
        if self.folder is None:
            return synthetic_scenes(self.kinds or KINDS, snr, convention)
        found = folder_scenes(self.folder, _PARTS[part], snr, convention, seed)
        unknown = sorted({*(self.kinds or ())} - {*found})
        if unknown:
            raise AdaptError(
                f"{self.folder} has no noise {unknown[0]!r}; it has {', '.join(found)}"
            )
        return {kind: found[kind] for kind in self.kinds or found}

    def added(
        self,
        scenes: Mapping[str, Scene],
        clip: Tensor,
        generator: Generator,
        speaker: str | None = None,
    ) -> Tensor:
        """A clip [n] in one of the scenes [n]."""
        return draw_any(scenes, clip, generator, speaker, self.clean_share)[0]

    def label(self) -> dict[str, Any]:
        """What a set is for that was trained in this noise, for its file."""
        kinds = self.kinds or (list(KINDS) if self.folder is None else [self.folder])
        return {
            "category": "+".join(kinds),
            "snr_db": [self.low, self.high],
            "convention": self.convention,
        }
