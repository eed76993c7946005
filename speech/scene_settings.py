"""The noise that a data module adds to its clips, as plain settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from ..core.errors import AdaptError
from .clips import Clip, Parts
from .noise import convention_named
from .noise_folders import folder_scenes
from .scenes import KINDS, Between, Scene, Talkers, draw_any, synthetic_scenes

_OWN = {"babble": 30, "side": 1}
"""What other speakers of the data can be, and how many of their clips sound at once."""
_PARTS = {"train": "train", "val": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Scenes that clips are mixed with: generated `kinds`, or recordings of a `folder`.

    A clip gets one of the scenes, and an SNR from `low` to `high` dB in the `convention` (full,
    active, active-D). `clean_share` of the clips stay clean. The recordings of a folder (of MUSAN's
    layout, or one category) are divided 80/10/10 among training, validation and test. With
    `own_speakers`, babble and side speakers are clips of the part's other speakers, heard when they
    are drawn; every clip then needs a speaker, every part two, and no speaker is in two parts.
    """

    kinds: list[str] | None = None
    folder: str | None = None
    own_speakers: bool = False
    low: float = -5.0
    high: float = 10.0
    convention: str = "full"
    clean_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.clean_share <= 1:
            raise AdaptError(f"noise: clean_share={self.clean_share} is not a share from 0 to 1")
        if self.kinds is not None and not self.kinds:
            raise AdaptError("noise: kinds=[] names no noise; null takes all kinds")
        if self.own_speakers and not {*_OWN} & {*(self.kinds or _OWN)}:
            raise AdaptError(
                "noise: own_speakers is for babble and side, kinds are "
                f"{', '.join(self.kinds or ())}"
            )
        convention_named(self.convention)
        Between(self.low, self.high)
        if self.folder is None:
            synthetic_scenes(self.kinds or KINDS)  # refuses a kind that there is not

    def scenes(self, part: str, seed: int, clips: Sequence[Clip] = ()) -> dict[str, Scene]:
        """The scenes of a part: train, val or test; `clips` are its own."""
        snr, convention = Between(self.low, self.high), convention_named(self.convention)
        if self.folder is None:
            found = synthetic_scenes(self.kinds or KINDS, snr, convention)
        else:
            found = folder_scenes(self.folder, _PARTS[part], snr, convention, seed)
        if self.own_speakers:
            talkers = _by_speaker(clips)
            found |= {k: Scene(k, Talkers(talkers, n), snr, convention) for k, n in _OWN.items()}
        unknown = sorted({*(self.kinds or ())} - {*found})
        if unknown:
            raise AdaptError(
                f"{self.folder} has no noise {unknown[0]!r}; it has {', '.join(found)}"
            )
        return {kind: found[kind] for kind in self.kinds or found}

    def require_speakers(self, parts: Parts) -> None:
        """Refuse parts whose own speakers cannot be the noise, with `own_speakers`."""
        before: dict[str, str] = {}
        for part, clips in parts.items() if self.own_speakers else ():
            voices = _by_speaker(clips)
            if len(voices) == 1:
                raise AdaptError(
                    f"noise: own_speakers needs two speakers in each part, {part} has {[*voices]}"
                )
            if twice := sorted({*voices} & {*before}):
                raise AdaptError(
                    f"noise: own_speakers: {twice[0]!r} speaks in {before[twice[0]]} and in {part};"
                    " divide the clips with split_by: speaker"
                )
            before |= dict.fromkeys(voices, part)

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
        return {
            "category": "+".join(self.kinds or self._all_kinds()),
            "snr_db": [self.low, self.high],
            "convention": self.convention,
            **({"own_speakers": True} if self.own_speakers else {}),
        }

    def _all_kinds(self) -> list[str]:
        """What the scenes are called where no kinds are named."""
        found = KINDS if self.folder is None else folder_scenes(self.folder)
        return list(dict.fromkeys([*found, *(_OWN if self.own_speakers else ())]))


def _by_speaker(clips: Sequence[Clip]) -> dict[str, list[Callable[[], Tensor]]]:
    """Speaker -> what reads each of the clips."""
    found: dict[str, list[Callable[[], Tensor]]] = {}
    for clip in clips:
        if clip.speaker is None:
            raise AdaptError(f"noise: own_speakers: {clip.name} names no speaker")
        found.setdefault(clip.speaker, []).append(clip.hear)
    return found
