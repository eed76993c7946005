"""Spoken digits in noise: speakers and noise of training, validation and test apart.

Of six speakers a fold tests on two. One of the other four is heard in validation alone, the cost
matrix and the selector's temperature come from it; sets and selector are trained on the last three.
Each part has its own noise: babble, 30 clips at a time of eSpeak's voices that say sentences
(voices and sentences of a part are in no other; where eSpeak is missing, 30 generated voices);
generated music, white and pink noise, engines. All of it is drawn by seeds, and the babble is kept
in a folder, so that an interrupted benchmark goes on with the same mixtures.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Generator, Tensor

from polyadapt.benchmarks.espeak import say, sentences
from polyadapt.benchmarks.speech_digits import Digits
from polyadapt.core import container
from polyadapt.speech.audio import SAMPLE_RATE
from polyadapt.speech.clips import Clip
from polyadapt.speech.noise import Label, fitted
from polyadapt.speech.scenes import USUAL_SNR, Between, Scene, Source, Synthetic, Talkers, seeded

CATEGORIES = ("babble", "music", "white-pink", "engine")
SNRS = (-5.0, 0.0, 5.0, 10.0)
POOL = {"train": 96, "val": 32, "test": 48}  # signals of a part and category
SIGNAL = 4 * SAMPLE_RATE

VOICES = {
    "train": ("en-us", "en", "en-us+f1", "en+f2", "en-us+m1", "en+m2", "en-us+m3", "en+m3"),
    "val": ("en-us+f3", "en+f3", "en-us+m4", "en+m4", "en-us+m5", "en+m5"),
    "test": ("en-us+f4", "en+f4", "en-us+f5", "en-us+m6", "en+m6", "en-us+m7"),
}
SAYS = 6  # sentences of a voice


@dataclass(frozen=True)
class Pool:
    """Signals that were drawn once: a draw is a part of one of them."""

    signals: Sequence[Tensor]

    def draw(self, length: int, generator: Generator, without: str | None = None) -> Tensor:
        chosen = int(torch.randint(len(self.signals), (), generator=generator))
        return fitted(self.signals[chosen], length, generator)


def has_espeak() -> bool:
    """The library is there, so that babble is of sentences."""
    return importlib.util.find_spec("espeakng_loader") is not None


class Noises:
    """The noise of each part, drawn when it is first needed.

    eSpeak says a sentence a little differently in each process, so its babble is kept in `folder`:
    an interrupted benchmark goes on with the same.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pools: dict[tuple[str, str], Pool] = {}

    def scenes(
        self, part: str, snr_db: Between | tuple[float, ...] = USUAL_SNR
    ) -> dict[str, Scene]:
        """The scenes of a part: train, val or test."""
        return {c: Scene(c, self._pool(part, c), snr_db) for c in CATEGORIES}

    def _pool(self, part: str, category: str) -> Pool:
        if (part, category) not in self.pools:
            made = self._babble(part) if category == "babble" else _signals(part, category)
            self.pools[part, category] = Pool(made)
        return self.pools[part, category]

    def _babble(self, part: str) -> list[Tensor]:
        file = self.folder / f"babble_{part}.safetensors"
        if not file.exists():
            signals = torch.stack(_signals(part, "babble"))
            container.write(file, {"kind": "noise"}, {"signals": signals.half()})
        return list(container.read(file)[1]["signals"].float())


def _signals(part: str, category: str) -> list[Tensor]:
    sources = _sources(part)[category]
    return [
        sources[i % len(sources)].draw(SIGNAL, seeded("pool", part, category, i))
        for i in range(POOL[part])
    ]


def _sources(part: str) -> dict[str, list[Source]]:
    return {
        "babble": [_sentences(part) if has_espeak() else Synthetic("babble")],
        "music": [Synthetic("music")],
        "white-pink": [Synthetic("white"), Synthetic("pink")],
        "engine": [Synthetic("engine")],
    }


def _sentences(part: str) -> Talkers:
    """Voices of a part, each with sentences of its own."""
    voices = [(of, voice) for of, spoken in VOICES.items() for voice in spoken]
    every = sentences(SAYS * len(voices))
    texts = {pair: every[SAYS * n : SAYS * n + SAYS] for n, pair in enumerate(voices)}
    spoken = {v: [say(text, v) for text in said] for (of, v), said in texts.items() if of == part}
    return Talkers(spoken)


class Fold:
    """The clean clips of a fold and their mixtures for validation and test.

    `limit`: so many clips of a part alone, over all digits and speakers.
    """

    def __init__(
        self, digits: Digits, number: int, noises: Noises, limit: int | None = None
    ) -> None:
        rest, test = digits.fold(number)
        names = sorted({clip.speaker or "" for clip in rest})
        self.number, self.noises = number, noises
        self.validation_speaker = names[number % len(names)]
        self.train = [clip for clip in rest if clip.speaker != self.validation_speaker]
        alone = [clip for clip in rest if clip.speaker == self.validation_speaker]
        self.clean = {"val": _thinned(alone, limit), "test": _thinned(test, limit)}

    @cached_property
    def val(self) -> list[Clip]:
        """Each validation clip in each noise."""
        return grid(self.clean["val"], self.noises, "val")

    @cached_property
    def test(self) -> list[Clip]:
        """Each test clip in each noise."""
        return grid(self.clean["test"], self.noises, "test")


def _thinned(clips: list[Clip], limit: int | None) -> list[Clip]:
    return clips if limit is None else clips[:: -(-len(clips) // limit)]


def grid(clips: Sequence[Clip], noises: Noises, part: str) -> list[Clip]:
    """Each clip in each noise, at one of the four SNRs in turn; all sets hear the same mixtures."""
    made = []
    for i, clip in enumerate(clips):
        for c, category in enumerate(CATEGORIES):
            snr = SNRS[(i + c) % len(SNRS)]
            scene = noises.scenes(part, (snr,))[category]
            audio, _ = scene.draw(clip.hear(), seeded("grid", part, clip.name, category))
            hear = partial(_same, audio)
            made.append(replace(clip, name=f"{clip.name}|{category}|{snr:g}", hear=hear))
    return made


def named(mixture: str) -> tuple[str, Label]:
    """(clip, label) of a mixture's name.

    >>> named("3_theo_0|babble|-5")[1].snr_db
    -5.0
    """
    clip, category, snr = mixture.split("|")
    return clip, Label(category, float(snr))


def training(fold: Fold, among: Sequence[str], count: int, seed: int) -> list[Clip]:
    """`count` mixtures with noise of these categories, from -5 to 10 dB; none is heard twice."""
    ready, chosen = fold.noises.scenes("train"), seeded("training", *among, seed)
    clips, made = fold.train, []
    for i in range(count):
        clip = clips[int(torch.randint(len(clips), (), generator=chosen))]
        scene = ready[among[i % len(among)]]
        hear = partial(_mixed, clip, scene, ("training", seed, i))
        made.append(replace(clip, name=f"{clip.name}|{scene.category}|{i}", hear=hear))
    return made


def _mixed(clip: Clip, scene: Scene, place: tuple[int | str, ...]) -> Tensor:
    return scene.draw(clip.hear(), seeded(*place))[0]


def _same(audio: Tensor) -> Tensor:
    return audio
