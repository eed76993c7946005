"""What the file of a speech set says besides its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import AdaptError, StoreError
from ..core.store import read_file
from .audio import frames_of
from .backbones import Backbone
from .words import Normaliser

TASK, FILMED = "speech-recognition", "audio-visual-speech"


@dataclass(frozen=True)
class Description:
    """The Whisper that a set was made on, how it was trained to be used, and how it is scored.

    A `filmed` set is an audio-visual one: it acts where there is a video of the speaker's mouth.
    """

    backbone: Backbone
    seconds: float
    language: str
    task: str
    timestamps: bool
    normaliser: Normaliser = field(default_factory=Normaliser)
    longest: int | None = None
    label: Mapping[str, Any] | None = None
    filmed: bool = False

    def to_json(self) -> dict[str, Any]:
        """As a set's `extra`."""
        found: dict[str, Any] = {
            "task": FILMED if self.filmed else TASK,
            "backbone": self.backbone.to_json(),
            "seconds": self.seconds,
            "language": self.language,
            "says": self.task,
            "timestamps": self.timestamps,
            "normaliser": dataclasses.asdict(self.normaliser),
            "longest": self.longest,
        }
        return found if self.label is None else {**found, "label": dict(self.label)}


def describe(path: str | Path) -> Description:
    """What a file says; `StoreError` where it is missing, damaged or of another task."""
    return described(read_file(path).extra, path)


def described(extra: Mapping[str, Any], path: str | Path = "the set") -> Description:
    """The same from a set's `extra`."""
    if extra.get("task") not in (TASK, FILMED):
        raise StoreError(f"{path} holds no set for speech recognition: task {extra.get('task')!r}")
    try:
        found = Description(
            backbone=Backbone.from_json(extra["backbone"]),
            seconds=float(extra["seconds"]),
            language=str(extra["language"]),
            task=str(extra.get("says", "transcribe")),
            timestamps=bool(extra["timestamps"]),
            normaliser=Normaliser(**extra.get("normaliser", {})),
            longest=extra.get("longest"),
            label=extra.get("label"),
            filmed=extra["task"] == FILMED,
        )
        frames_of(found.seconds)
    except (AdaptError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} lacks or misstates what a speech set says: {error}") from error
    return found
