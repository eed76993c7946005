"""What the frozen Whisper and every set make of the same mixtures, and what a selector hears."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..core.activation import activate
from .audio import LONGEST, log_mel
from .bundle_record import Hearing
from .decision import NONE
from .decoding import Decoding
from .description import Description
from .listening import Heard, listen
from .mixtures import Mixture
from .model import Speech
from .noise import Label
from .selector import Selector
from .words import count

_PATIENCE = 10.0  # seconds between two lines of progress


@dataclass
class Trial:
    """Columns over the mixtures: word errors by set (and "none"), and what the mixtures are."""

    errors: dict[str, list[float]] = field(default_factory=dict)
    words: list[float] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    clips: list[str] = field(default_factory=list)
    heard: list[Heard | None] = field(default_factory=list)


def tried(
    speech: Speech,
    sets: Mapping[str, Description],
    mixtures: Sequence[Mixture],
    ear: tuple[Selector, Hearing],
    batch: int = 8,
    told: Callable[[str], None] = print,
) -> Trial:
    """Decode every mixture greedily without a set and with each, attached under these names.

    Each set hears in the context that it was trained in, the frozen Whisper in 30 s. Errors are
    counted by the rule of the first set, which is to be that of all. A mixture is drawn once.
    """
    found, last = Trial({name: [] for name in (NONE, *sets)}), time.monotonic()
    for start in range(0, len(mixtures), batch):
        _try(found, speech, sets, mixtures[start : start + batch], ear)
        if time.monotonic() - last > _PATIENCE or len(found.words) == len(mixtures):
            told(f"{len(found.words)} of {len(mixtures)} mixtures are transcribed")
            last = time.monotonic()
    return found


def _try(
    found: Trial,
    speech: Speech,
    sets: Mapping[str, Description],
    mixtures: Sequence[Mixture],
    ear: tuple[Selector, Hearing],
) -> None:
    sounds, labels = zip(*(mixture.draw() for mixture in mixtures), strict=True)
    rule = next(iter(sets.values()))
    for name in found.errors:
        said = _said(speech, None if name == NONE else name, sounds, sets.get(name, rule))
        counts = [
            count(text, mixture.clip.text, rule.normaliser, rule.language)
            for text, mixture in zip(said, mixtures, strict=True)
        ]
        found.errors[name] += [one.edits for one in counts]
    found.words += [one.words for one in counts]
    found.labels += labels
    found.clips += [mixture.clip.name for mixture in mixtures]
    found.heard += [listen(*ear, sound) for sound in sounds]


def _said(
    speech: Speech, name: str | None, sounds: Sequence[Tensor], about: Description
) -> list[str]:
    seconds, longest = (LONGEST, None) if name is None else (about.seconds, about.longest)
    asked = Decoding(
        language=about.language, task=about.task, timestamps=about.timestamps, longest=longest
    )
    with activate(speech.model, name):
        results = speech.decode(log_mel(sounds, speech.dims.n_mels, seconds), asked)
    return [result.text for result in results]
