"""What an audio-visual set is trained on and for: the paper's stages, and sets by noise or by SNR.

The stages, the SNRs and the share of clean clips are those of arXiv 2502.01709. The overlap of the
level sets is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from .scenes import Between, Scene


@dataclass(frozen=True)
class Stage:
    """One row of the paper's recipe; `sites` are those of `sites_for`."""

    sites: str
    tokens: bool
    """The loss also compares what the decoder says (L_ft), not only mel and states (L_pre)."""
    lr: float
    last_lr: float
    iterations: int
    data: str


# Batches of 16. For Whisper small the paper halves the rate after stage 1.
STAGES: Final[Mapping[int, Stage]] = {
    1: Stage("encoder-attention", False, 1e-4, 1e-4, 112_000, "VoxCeleb2, English, 1700 h"),
    2: Stage("encoder-attention", False, 1e-4, 1e-4, 112_000, "LRS3, 437 h"),
    3: Stage("attention", True, 1e-5, 1e-5, 21_000, "LRS3, 437 h"),
    4: Stage("attention", True, 1e-5, 1e-7, 21_000, "LRS3, 437 h"),
}

ALL_SNR: Final = Between(-15.0, 30.0)
CLEAN_SHARE: Final = 0.05


@dataclass(frozen=True)
class Levels:
    """Two sets by SNR: they part at `boundary` and learn `overlap` dB beyond it.

    The choice between them is made at `choose_at`: 5 dB, not 0 (arXiv 2502.01709).
    """

    boundary: float = 0.0
    overlap: float = 3.0
    choose_at: float = 5.0
    snr_db: Between = ALL_SNR

    def ranges(self) -> dict[str, Between]:
        """The SNRs that each set is trained at.

        >>> Levels().ranges()["HighNoise"]
        Between(low=-15.0, high=3.0)
        """
        return {
            "HighNoise": Between(self.snr_db.low, self.boundary + self.overlap),
            "LowNoise": Between(self.boundary - self.overlap, self.snr_db.high),
        }

    def chosen(self, snr_db: float) -> str:
        """The set for an SNR, known or predicted."""
        return "HighNoise" if snr_db < self.choose_at else "LowNoise"


def category_sets(
    scenes: Mapping[str, Scene], snr_db: Between = ALL_SNR
) -> dict[str, dict[str, Scene]]:
    """For each set, named after its category, the scenes that it is trained on: one, every SNR."""
    return {name: {name: replace(scene, snr_db=snr_db)} for name, scene in scenes.items()}


def level_sets(
    scenes: Mapping[str, Scene], levels: Levels | None = None
) -> dict[str, dict[str, Scene]]:
    """For each level the scenes that its set is trained on: every category, its SNRs."""
    ranges = (levels or Levels()).ranges()
    return {
        level: {name: replace(scene, snr_db=snr_db) for name, scene in scenes.items()}
        for level, snr_db in ranges.items()
    }
