"""A tiny Whisper's noise sets, clips of one sentence, and a script of what each set hears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import soundfile
from torch import Tensor

from polyadapt.core import LoRA
from polyadapt.speech import trial
from polyadapt.speech.backbones import OpenAIWhisper
from polyadapt.speech.decision import NONE
from polyadapt.speech.description import Description
from polyadapt.speech.model import Speech
from polyadapt.speech.scenes import seeded
from polyadapt.speech.synthetic import speech_like
from polyadapt.speech.task import SpeechRecognition
from polyadapt.speech.words import Normaliser

TEXT = "cat dog"
LABELS: dict[str, dict[str, Any]] = {
    "hiss": {"category": "white", "snr_db": [-5, 10], "convention": "full"},
    "voice": {"category": "side", "snr_db": [-5, 10], "convention": "full"},
    "all": {"category": "white+side", "snr_db": [-5, 10], "convention": "full"},
}
SCRIPT = {NONE: ("x y", "x y"), "hiss": (TEXT, "x y"), "voice": ("x", TEXT), "all": ("cat", "cat")}
"""Set -> what it hears in the first noise and in the second."""


def save_clips(count: int = 6, val: int = 2) -> str:
    """Voices of half a second in m.csv; the last ones are for validation."""
    Path("clips").mkdir(exist_ok=True)
    lines = ["path,text,speaker,split"]
    for number in range(count):
        voice = speech_like(8_000, seeded("bundle clip", number)) / 10
        soundfile.write(f"clips/{number}.wav", voice.numpy(), 16_000, subtype="FLOAT")
        part = "val" if number >= count - val else "train"
        lines.append(f"clips/{number}.wav,{TEXT},s{number},{part}")
    Path("m.csv").write_text("\n".join(lines) + "\n")
    return "m.csv"


def save_set(
    name: str, label: Mapping[str, Any] | None = None, rank: int = 2, digits: bool = False
) -> str:
    """NAME.safetensors, an untrained set of the Whisper in tiny.pt."""
    task = SpeechRecognition(
        OpenAIWhisper(name="tiny.pt"),
        LoRA(rank=rank),
        seconds=0.6,
        longest=3,
        normaliser=Normaliser(digits=digits),
        label=None if label is None else dict(label),
        seed=0,
    )
    task.save_adapter(f"{name}.safetensors")
    return f"{name}.safetensors"


def script(monkeypatch: pytest.MonkeyPatch, said: Mapping[str, Sequence[str]]) -> None:
    """What is transcribed follows the script, noise by noise as the mixtures come."""

    def by_script(
        speech: Speech, name: str | None, sounds: Sequence[Tensor], about: Description
    ) -> list[str]:
        lines = said[name or NONE]
        return [lines[i % len(lines)] for i in range(len(sounds))]

    monkeypatch.setattr(trial, "_said", by_script)


def sets(*names: str) -> list[str]:
    return [word for name in names for word in ("--set", save_set(name, LABELS[name]))]


def quick(*words: str, data: str = "m.csv", steps: int = 2) -> list[str]:
    """The words of a command whose selector is hardly trained."""
    return ["bundle", *words, "--data", data, "--steps", str(steps), "--seconds", "0.4"]
