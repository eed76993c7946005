"""When each word was said: openai-whisper's alignment by cross-attention, on encoded states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from whisper.model import Whisper
from whisper.timing import add_word_timestamps

from ..core.errors import AdaptError
from .model import OpenAISpeech, Speech
from .segments import Segment, Word


def require_word_times(speech: Speech) -> OpenAISpeech:
    """Refuse a layout whose class does not show its attention to this alignment."""
    if isinstance(speech, OpenAISpeech):
        return speech
    raise AdaptError(
        "word times are found in the openai layout alone: choose an openai-whisper model"
        " (`--model tiny.en`); a set trained on transformers' Whisper loads on it"
    )


def with_words(
    speech: OpenAISpeech,
    tokenizer: Any,
    segments: Sequence[Segment],
    states: Tensor,
    seconds: float,
    silent_since: float,
) -> list[Segment]:
    """The segments of one window with their words; segments begin and end as their words do.

    `states` [n, d] is the encoded window, `seconds` the length of its audio, `silent_since` the
    end of the last word before it (all times count from the window's begin). The same adapter sets
    must act as when it was encoded.
    """
    found = [
        {"seek": 0, "start": s.start, "end": s.end, "tokens": list(s.tokens)} for s in segments
    ]
    add_word_timestamps(
        segments=found,
        model=_Aligned(speech.model),
        tokenizer=tokenizer,
        mel=states,
        num_frames=max(2, int(seconds * 100)),
        last_speech_timestamp=silent_since,
    )
    return [_timed(s, f, seconds) for s, f in zip(segments, found, strict=True)]


def _timed(segment: Segment, found: dict[str, Any], seconds: float) -> Segment:
    words = tuple(
        Word(w["word"], *_within(w["start"], w["end"], seconds), float(w["probability"]))
        for w in found.get("words", ())
    )
    start, end = _within(found["start"], found["end"], seconds)
    return replace(segment, start=start, end=end, words=words)


def _within(start: float, end: float, seconds: float) -> tuple[float, float]:
    end = min(float(end), seconds)
    return min(float(start), end), end


class _Aligned:
    """What the alignment asks of a model; its "spectrograms" are states, already encoded."""

    def __init__(self, model: Whisper) -> None:
        self.dims, self.device = model.dims, model.device
        self.decoder, self.alignment_heads = model.decoder, model.alignment_heads

    def __call__(self, states: Tensor, tokens: Tensor) -> Tensor:
        logits: Tensor = self.decoder(tokens, states)
        return logits
