"""What was said and when: words, segments, transcripts; and tokens cut at their timestamps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

TOKEN_SECONDS = 0.02  # from one timestamp token to the next


@dataclass(frozen=True)
class Word:
    """A word with its punctuation, its time in seconds, and how sure the model is of it."""

    text: str
    start: float
    end: float
    probability: float


@dataclass(frozen=True)
class Segment:
    """Some seconds of speech."""

    start: float
    end: float
    text: str
    tokens: tuple[int, ...] = ()
    words: tuple[Word, ...] | None = None
    avg_logprob: float = 0.0
    no_speech_prob: float = 0.0
    set: str | None = None
    """The adapter set that heard it."""


@dataclass
class Transcript:
    """All that was heard so far of one recording."""

    language: str | None = None
    segments: list[Segment] = field(default_factory=list)
    seconds: float = 0.0
    """How far it was heard."""
    complete: bool = False
    error: str | None = None
    """Why the rest of the recording cannot be heard."""

    @property
    def text(self) -> str:
        """Everything said, in one line.

        >>> Transcript(segments=[Segment(0, 1, " Hello"), Segment(1, 2, " world. ")]).text
        'Hello world.'
        """
        return " ".join(segment.text.strip() for segment in self.segments)


@dataclass(frozen=True)
class Span:
    """Text tokens between two times of a window."""

    start: float
    end: float
    tokens: tuple[int, ...]


def spans(
    tokens: Sequence[int], eot: int, timestamps: int, seconds: float
) -> tuple[list[Span], float]:
    """A window's tokens, cut at their timestamps, and how much of the window is thereby heard.

    `timestamps` is the token of time 0, `seconds` the length of the window. Text after the last
    timestamp is left for the next window, which begins at that timestamp, unless nothing precedes
    it. Two timestamps at the end say that more speech follows, a single one that none does.

    >>> spans([100, 7, 8, 150, 150, 9], eot=50, timestamps=100, seconds=30.0)
    ([Span(start=0.0, end=1.0, tokens=(7, 8))], 1.0)
    >>> spans([7, 8], eot=50, timestamps=100, seconds=30.0)
    ([Span(start=0.0, end=30.0, tokens=(7, 8))], 30.0)
    """
    found: list[Span] = []
    start, text = 0.0, list[int]()
    for token in tokens:
        if token < eot:
            text.append(token)
        elif token >= timestamps:
            time = min((token - timestamps) * TOKEN_SECONDS, seconds)
            if text and start < seconds:
                found.append(Span(start, time, tuple(text)))
            start, text = time, []
    if text and not found and start < seconds:
        return [Span(start, seconds, tuple(text))], seconds
    more = bool(text) or (len(tokens) > 1 and tokens[-2] >= timestamps)
    return found, start if found and more and start > 0 else seconds


def later(segment: Segment, by: float) -> Segment:
    """The same segment, so many seconds later."""
    words = segment.words and tuple(
        replace(word, start=word.start + by, end=word.end + by) for word in segment.words
    )
    return replace(segment, start=segment.start + by, end=segment.end + by, words=words)
