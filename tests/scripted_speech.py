"""A stand-in for a Whisper that says what a script says, for tests of what is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from whisper.decoding import DecodingResult
from whisper.model import ModelDimensions

from polyadapt.speech.audio import log_mel
from polyadapt.speech.decoding import Decoding
from polyadapt.speech.model import Speech
from polyadapt.speech.tokens import Tokens
from polyadapt.tests.speech_models import ENGLISH

RATE, TIME = 16_000, 50363  # the token of <|0.00|>
TOKENS = Tokens(ENGLISH)


def words(text: str) -> list[int]:
    return TOKENS.pair(text)[0][2:]


def at(seconds: float) -> int:
    return TIME + round(seconds / 0.02)


def result(tokens: Sequence[int], **figures: float) -> DecodingResult:
    known = {"avg_logprob": -0.2, "no_speech_prob": 0.1, "compression_ratio": 1.0, **figures}
    return DecodingResult(
        audio_features=torch.zeros(1), language="en", tokens=list(tokens), **known
    )


@dataclass
class Scripted:
    """Stands where a `Speech` does and says what a script says of a window's loudness.

    Windows are constant signals; the mean power in the first frame tells one from another.
    """

    script: dict[float, list[DecodingResult]]
    dims: ModelDimensions = field(
        default_factory=lambda: ModelDimensions(80, 1500, 4, 1, 1, ENGLISH, 448, 4, 1, 1)
    )
    multilingual: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    model: nn.Module = field(default_factory=nn.Module)
    batches: list[tuple[int, int]] = field(default_factory=list)
    asked: list[Decoding] = field(default_factory=list)

    def encode(self, mel: Tensor) -> Tensor:
        self.batches.append((len(mel), mel.shape[2]))
        return mel.mean(dim=1)[:, :4]  # [b, 4]

    def decode_states(self, states: Tensor, asked: Decoding) -> list[DecodingResult]:
        self.asked.append(asked)
        return [self._said(float(state[2])) for state in states]

    def _said(self, found: float) -> DecodingResult:
        nearest = min(self.script, key=lambda level: abs(_level(level) - found))
        said = self.script[nearest]
        return said.pop(0) if len(said) > 1 else said[0]


def tone(level: float, seconds: float) -> Tensor:
    """White noise of one seed, as loud as `level` says."""
    noise = torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(0))
    return level * noise / 4


def _level(level: float) -> float:
    return float(log_mel([tone(level, 1.0)], seconds=1.0)[0].mean(dim=0)[2])


def scripted_speech(script: dict[float, list[DecodingResult]]) -> tuple[Scripted, Speech]:
    made = Scripted(script)
    return made, cast(Speech, made)


A, B = words("one two"), words("three")
