"""Acoustic scenes: what noise a clip is mixed with, at which SNR, from which source.

A scene draws a mixture for a clip by a generator, and says in the label what it drew. Training
data, the selector and the benchmarks all draw from here. Sources are generators (`synthetic`),
recordings in folders (`noise_folders`) and the voices of other speakers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Generator, Tensor

from ..core.errors import AdaptError
from .noise import CLEAN, FULL, Convention, Label, fitted, mix, usable
from .synthetic import GENERATORS, unit_power

_MOST_DRAWS = 50
KINDS = ("babble", "music", "stationary", "engine", "natural", "side")


class Source(Protocol):
    """Where noise comes from."""

    def draw(self, length: int, generator: Generator, without: str | None = None) -> Tensor:
        """fp32 [length]; the speaker `without` is not in it."""


@dataclass(frozen=True)
class Synthetic:
    """Generated noise of one kind; the kinds are the keys of `synthetic.GENERATORS`.

    >>> Synthetic("wind")
    Traceback (most recent call last):
        ...
    polyadapt.core.errors.AdaptError: unknown synthetic noise 'wind'; allowed: babble, brown, ...
    """

    kind: str

    def __post_init__(self) -> None:
        if self.kind not in GENERATORS:
            allowed = ", ".join(GENERATORS)
            raise AdaptError(f"unknown synthetic noise {self.kind!r}; allowed: {allowed}")

    def draw(self, length: int, generator: Generator, without: str | None = None) -> Tensor:
        return GENERATORS[self.kind](length, generator)


@dataclass(frozen=True)
class Talkers:
    """Babble of other people's clips, each equally loud: their mean; one talker: a side speaker.

    `clips` are those of each speaker, [n] or what reads it. The mean of K independent signals of
    unit power has the power 1/K; the gain of the mixture sets the level in the end.
    """

    clips: Mapping[str, Sequence[Tensor | Callable[[], Tensor]]]
    talkers: int = 30

    def draw(self, length: int, generator: Generator, without: str | None = None) -> Tensor:
        """fp32 [length], or zeros where all others are silent."""
        others = [clip for name in self.clips if name != without for clip in self.clips[name]]
        if not others:
            raise AdaptError(
                f"no clip of a speaker other than {without!r} for babble; speakers: "
                f"{', '.join(self.clips) or 'none'}"
            )
        order = torch.randperm(len(others), generator=generator).tolist()
        sounds = (
            clip if isinstance(clip, Tensor) else clip() for clip in map(others.__getitem__, order)
        )
        heard = islice((sound for sound in sounds if sound.any()), self.talkers)
        parts = [fitted(sound, length, generator) for sound in heard]
        return overlay(parts) if parts else torch.zeros(length)


def overlay(signals: Sequence[Tensor]) -> Tensor:
    """K signals [n] of any loudness -> the mean [n] of them at unit power.

    >>> overlay([torch.tensor([2.0, -2.0]), torch.tensor([5.0, 5.0])])
    tensor([1., 0.])
    """
    return torch.stack([unit_power(signal.float()) for signal in signals]).mean(0)


@dataclass(frozen=True)
class Between:
    """SNRs uniform between two bounds, in dB."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise AdaptError(f"an SNR between {self.low} and {self.high} dB: low comes first")

    def draw(self, generator: Generator) -> float:
        """One SNR."""
        return self.low + (self.high - self.low) * float(torch.rand((), generator=generator))


USUAL_SNR = Between(-5.0, 10.0)


@dataclass(frozen=True)
class Scene:
    """Noise of one category from one source at SNRs in dB, given as a range or as a list.

    >>> scene = Scene("babble", Synthetic("babble"), snr_db=(5.0,))
    >>> mixture, label = scene.draw(torch.ones(16000) / 4, Generator().manual_seed(0))
    >>> mixture.shape, str(label)
    (torch.Size([16000]), 'babble at 5 dB (full)')
    """

    category: str
    source: Source | None = None
    """None: nothing is mixed in, the clip stays clean."""
    snr_db: Between | tuple[float, ...] = USUAL_SNR
    convention: Convention = FULL

    def draw(
        self, clip: Tensor, generator: Generator, speaker: str | None = None
    ) -> tuple[Tensor, Label]:
        """A mixture [n] for a clip [n]; whose `speaker` is not taken for the noise.

        Silent noise is drawn again; a silent clip comes back, labelled clean.
        """
        clip = usable(clip, "clip")
        if self.source is None or not clip.any():
            return clip, Label(self.category if self.source is None else CLEAN)
        noise = self._noise(self.source, clip.numel(), generator, speaker)
        snr = self._snr(generator)
        return mix(clip, noise, snr, self.convention), Label(self.category, snr, self.convention)

    def _noise(
        self, source: Source, length: int, generator: Generator, speaker: str | None
    ) -> Tensor:
        for _ in range(_MOST_DRAWS):
            noise = source.draw(length, generator, speaker)
            if noise.any():
                return noise
        raise AdaptError(f"the source of {self.category!r} gave silence {_MOST_DRAWS} times")

    def _snr(self, generator: Generator) -> float:
        if isinstance(self.snr_db, Between):
            return self.snr_db.draw(generator)
        if not self.snr_db:
            raise AdaptError(f"the scene {self.category!r} lists no SNR")
        return self.snr_db[int(torch.randint(len(self.snr_db), (), generator=generator))]


def synthetic_scenes(
    kinds: Sequence[str] = KINDS,
    snr_db: Between | tuple[float, ...] = USUAL_SNR,
    convention: Convention = FULL,
    clean: bool = False,
) -> dict[str, Scene]:
    """A scene of generated noise for every kind, and clean speech if wanted.

    >>> list(synthetic_scenes(("music", "white"), clean=True))
    ['music', 'white', 'clean']
    """
    made = {kind: Scene(kind, Synthetic(kind), snr_db, convention) for kind in kinds}
    return made | ({CLEAN: Scene(CLEAN)} if clean else {})


def draw_any(
    scenes: Mapping[str, Scene],
    clip: Tensor,
    generator: Generator,
    speaker: str | None = None,
    clean_share: float = 0.0,
) -> tuple[Tensor, Label]:
    """A mixture from a scene that the generator draws; this share of the clips stays clean."""
    if not scenes:
        raise AdaptError("no scene to draw from: name at least one")
    names = list(scenes)
    if clean_share and float(torch.rand((), generator=generator)) < clean_share:
        return usable(clip, "clip"), Label(CLEAN)
    scene = scenes[names[int(torch.randint(len(names), (), generator=generator))]]
    return scene.draw(clip, generator, speaker)


def seeded(*place: int | str) -> Generator:
    """A generator of its own for a place, such as (seed, epoch, clip): the order does not matter.

    >>> bool(torch.rand(1, generator=seeded(0, 7)) == torch.rand(1, generator=seeded(0, 7)))
    True
    """
    digest = hashlib.sha256(repr(place).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def split(
    names: Iterable[str], shares: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0
) -> list[list[str]]:
    """Speakers or recordings in disjoint parts, as train, validation, test; none is left out.

    Split these, and mix afterwards: a split of pieces would put one voice into two parts. Every
    part gets at least one name.

    >>> split(["ann", "bob", "cid", "dan"], (0.5, 0.5))
    [['ann', 'cid'], ['bob', 'dan']]
    """
    ordered = sorted(set(names))
    if len(ordered) < len(shares) or min(shares) <= 0:
        raise AdaptError(
            f"{len(ordered)} names cannot be split into {len(shares)} parts of {tuple(shares)}: "
            "every part needs a positive share and a name"
        )
    order = torch.randperm(len(ordered), generator=seeded("split", seed)).tolist()
    shuffled = [ordered[i] for i in order]
    ends = [round(sum(shares[: i + 1]) / sum(shares) * len(ordered)) for i in range(len(shares))]
    for i in range(len(ends)):  # at least one before this end in each part, and after it
        ends[i] = min(max(ends[i], ends[i - 1] + 1 if i else 1), len(ordered) - len(ends) + 1 + i)
    return [sorted(shuffled[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def snr_of(label: Label, low: float = -15.0, high: float = 30.0) -> float:
    """The SNR as a regression target: clipped, and clean speech at the upper end.

    >>> snr_of(Label("babble", -40.0)), snr_of(Label(CLEAN))
    (-15.0, 30.0)
    """
    return min(max(label.snr_db, low), high)
