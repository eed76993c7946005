"""openai-whisper's decoding for states that are already encoded, of either layout."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from whisper.decoding import (
    BeamSearchDecoder,
    DecodingOptions,
    DecodingResult,
    DecodingTask,
    Inference,
    detect_language,
)
from whisper.model import ModelDimensions

from ..core.errors import AdaptError
from .tokens import Prompt, Tokens, language_code

MULTILINGUAL = 51865  # the smallest vocabulary that holds language tokens


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How to decode: greedy unless `beam` or `temperature` say otherwise.

    `language`: a code or name; None lets a multilingual Whisper hear it for itself. `prompt`: text
    that is taken to precede, such as names to expect. `longest`: tokens at most (None: half of the
    decoder's room, 224).
    """

    language: str | None = None
    task: str = "transcribe"
    timestamps: bool = False
    beam: int | None = None
    temperature: float = 0.0
    prompt: str | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        if self.beam is not None and (self.beam < 1 or self.temperature > 0):
            raise AdaptError(f"a beam has at least one path and temperature 0, not {self}")
        if self.temperature < 0 or (self.longest is not None and self.longest < 1):
            raise AdaptError(f"temperature is at least 0, longest at least 1, not {self}")


@dataclass(frozen=True)
class Listener:
    """What openai-whisper's decoding asks of a model, for states that are already encoded."""

    dims: ModelDimensions
    logits: Callable[[Tensor, Tensor], Tensor]
    decoder: Any  # whose blocks hold the keys and values; none where a cache does

    @property
    def is_multilingual(self) -> bool:
        return bool(self.dims.n_vocab >= MULTILINGUAL)

    @property
    def num_languages(self) -> int:
        return int(self.dims.n_vocab - 51765 - self.is_multilingual)

    def encoder(self, states: Tensor) -> Tensor:
        """The identity: detecting a language encodes what does not have the shape of states."""
        return states

    def detect_language(self, states: Tensor, tokenizer: Any) -> Any:
        return detect_language(self, states, tokenizer)


class _Task(DecodingTask):  # type: ignore[misc]
    """One decode; states [b, t, d] of any length, any dtype, and beams for a batch, too.

    Upstream (20250625) gives a beam's paths no states of their own, so that it takes one clip at
    a time; here every path has those of its clip.
    """

    def __init__(
        self, listener: Listener, inference: Callable[[int], Inference], options: DecodingOptions
    ) -> None:
        super().__init__(listener, options)
        self.inference = inference(len(self.initial_tokens))
        if isinstance(self.decoder, BeamSearchDecoder):
            self.decoder.inference = self.inference

    def _get_audio_features(self, states: Tensor) -> Tensor:
        return states.repeat_interleave(self.n_group, dim=0)

    def _detect_language(self, states: Tensor, tokens: Tensor) -> Any:
        return super()._detect_language(states[:: self.n_group], tokens)


def decode(
    listener: Listener,
    inference: Callable[[int], Inference],
    states: Tensor,
    asked: Decoding,
) -> list[DecodingResult]:
    """Encoded clips [b, t, d] -> a result for each: text, tokens, language, probabilities."""
    n_vocab, language = listener.dims.n_vocab, asked.language
    if language is None and not listener.is_multilingual:
        language = "en"
    if language is not None:
        language = language_code(language, n_vocab)
    prompt = Prompt(language=language or "en", task=asked.task, timestamps=asked.timestamps)
    Tokens(n_vocab, prompt)  # refuses a task that the vocabulary lacks
    options = DecodingOptions(
        task=asked.task,
        language=language,
        temperature=asked.temperature,
        sample_len=asked.longest,
        beam_size=asked.beam,
        prompt=asked.prompt,
        without_timestamps=not asked.timestamps,
    )
    with torch.no_grad(), warnings.catch_warnings():
        # Upstream sorts the scores of a beam, a tensor, by numpy, in a way that is deprecated.
        warnings.filterwarnings("ignore", "__array_wrap__", DeprecationWarning)
        found: list[DecodingResult] = _Task(listener, inference, options).run(states)
    return found
