"""Recordings of any length as text: windows one after another, several recordings side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from whisper.decoding import DecodingResult

from ..core.activation import activate
from ..core.errors import AdaptError
from ..core.sets import sets_of
from .audio import LONGEST, SAMPLE_RATE, Recording, frames_of, log_mel
from .av_data import FilmedClip
from .decoding import Decoding
from .film import Film
from .fusion import Fusion
from .model import Speech
from .segments import Segment, Transcript, later, spans
from .tokens import language_code, tokenizer_of
from .word_times import require_word_times, with_words

# openai-whisper's rules (its `transcribe`): text that repeats itself or is unlikely is decoded
# again at higher temperatures; a window that is likely silent and unlikely text has none.
WARMER = (0.2, 0.4, 0.6, 0.8, 1.0)
MOST_COMPRESSED, LEAST_LIKELY, SILENT = 2.4, -1.0, 0.6

# Ours: below 0.1 s there is no word, below -80 dB of full scale no speech. On plain zeros Whisper
# says "you", and is sure of it.
SHORTEST, QUIETEST = 0.1, 1e-4


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How a window is heard: by which adapter set, in how much context, and told what.

    `set` None is the frozen model. `seconds` is the context that the set was trained in. Without
    timestamps a window is one segment, and a long recording is cut where it is quiet. `fusion` is
    an audio-visual set's, which acts where a recording has video, and not at all elsewhere.
    """

    set: str | None = None
    seconds: float = LONGEST
    language: str | None = None
    task: str = "transcribe"
    timestamps: bool = True
    longest: int | None = None
    fusion: Fusion | None = field(default=None, repr=False)  # windows are grouped by the repr


Source = str | Path | Tensor | FilmedClip
"""A file, samples [n] at 16 kHz, or a recording with the video of the speaker's mouth."""

Choose = Callable[[Tensor], Conditions]
"""The next samples [n] of a recording, at most 30 s -> how to hear them."""


@dataclass(frozen=True, kw_only=True)
class Manner:
    """What is the same for all recordings: `batch` of them side by side, beam, words, prompt."""

    batch: int = 8
    beam: int | None = None
    word_times: bool = False
    prompt: str | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or (self.beam is not None and self.beam < 1):
            raise AdaptError(f"batch and beam are at least 1, not {self.batch} and {self.beam}")


@dataclass
class _Running:
    number: int
    recording: Recording
    film: Film | None
    found: Transcript
    at: int = 0  # samples heard

    @classmethod
    def of(cls, number: int, source: Source, known: str | None) -> _Running:
        if not isinstance(source, FilmedClip):
            return cls(number, Recording(source), None, Transcript(known))
        film = Film(source)
        return cls(number, Recording(film.sound()), film, Transcript(known))


@dataclass(frozen=True)
class _Window:
    of: _Running
    audio: Tensor
    conditions: Conditions
    video: Tensor | None = None

    @property
    def seconds(self) -> float:
        return len(self.audio) / SAMPLE_RATE


def transcribe(
    speech: Speech,
    source: Source,
    conditions: Conditions | Choose | None = None,
    manner: Manner | None = None,
) -> Transcript:
    """A file, samples [n] at 16 kHz, or a filmed clip as text with segments.

    Raises `AdaptError` where it stops.

    >>> from polyadapt.speech.model import speech_of
    >>> from polyadapt.speech.offline import whisper_tiny_en
    >>> transcribe(speech_of(whisper_tiny_en()), torch.zeros(160)).text  # 10 ms of silence
    ''
    """
    found = Transcript()
    for _, found in transcribe_all(speech, [source], conditions, manner):  # noqa: B007
        pass
    if found.error is not None:
        raise AdaptError(found.error)
    return found


def transcribe_all(
    speech: Speech,
    sources: Sequence[Source],
    conditions: Conditions | Choose | None = None,
    manner: Manner | None = None,
) -> Iterator[tuple[int, Transcript]]:
    """Number and transcript of a recording, each time that one has grown; they run side by side.

    A recording that cannot be read ends with its `error`; the others go on. At most a window of
    each is in memory. What a window says depends on the window alone: neither on its batch nor on
    the text before it. Each transcript is one object that grows: whoever stops early keeps it.
    """
    manner, conditions = manner or Manner(), conditions or Conditions()
    choose = conditions if callable(conditions) else _always(conditions)
    if manner.word_times:
        require_word_times(speech)
    known = None if speech.multilingual else "en"
    waiting = deque(_Running.of(i, source, known) for i, source in enumerate(sources))
    running: list[_Running] = []
    while waiting or running:
        running += [
            waiting.popleft() for _ in range(min(manner.batch - len(running), len(waiting)))
        ]
        windows = []
        for one in running:
            if isinstance(step := _next_window(one, choose), _Window):
                windows.append(step)
            else:
                yield one.number, one.found
        for one in _heard(speech, windows, manner):
            yield one.number, one.found
        running = [r for r in running if not r.found.complete and r.found.error is None]


def _always(conditions: Conditions) -> Choose:
    return lambda audio: conditions


def _next_window(one: _Running, choose: Choose) -> _Window | None:
    """What to decode next; None where silence was passed over, or the recording ended or failed."""
    try:
        audio = one.recording.window(one.at, int(LONGEST * SAMPLE_RATE))
        if not _may_speak(audio):
            _advance(one, len(audio))
            return None
        conditions = choose(audio)
        audio = audio[: frames_of(conditions.seconds) * 160]
        if not conditions.timestamps and not one.recording.ends_by(one.at + len(audio)):
            audio = audio[: _quiet_place(audio)]
        video = _seen(one, len(audio), conditions.fusion)
    except AdaptError as error:
        one.found.error = str(error)
        return None
    if not _may_speak(audio):
        _advance(one, len(audio))
        return None
    told = conditions.language or one.found.language
    if conditions.fusion is not None and video is None:  # no set acts on what it cannot see
        conditions = replace(conditions, set=None, fusion=None)
    return _Window(one, audio, replace(conditions, language=told), video)


def _seen(one: _Running, samples: int, fusion: Fusion | None) -> Tensor | None:
    if one.film is None or fusion is None:
        return None
    return one.film.during(one.at, samples, fusion.sizes)


def _may_speak(audio: Tensor) -> bool:
    return len(audio) >= SHORTEST * SAMPLE_RATE and float(audio.abs().max()) >= QUIETEST


def _advance(one: _Running, samples: int) -> None:
    one.at += samples
    one.found.seconds = one.at / SAMPLE_RATE
    try:
        one.found.complete = one.recording.ends_by(one.at)
    except AdaptError as error:
        one.found.error = str(error)


def _quiet_place(audio: Tensor) -> int:
    """Where to cut: the middle of the quietest 0.1 s of the last third."""
    step = SAMPLE_RATE // 10
    first = len(audio) * 2 // 3
    power = audio[first:].unfold(0, step, step // 2).square().mean(dim=1)
    return first + int(power.argmin()) * (step // 2) + step // 2


def _heard(speech: Speech, windows: Iterable[_Window], manner: Manner) -> Iterator[_Running]:
    """Decode the windows, those that are heard alike in one batch."""

    def alike(window: _Window) -> str:
        # A beam decodes each window in several rows, so its rows cannot differ in their sets.
        same = window.conditions if manner.beam else replace(window.conditions, set=None)
        return repr(same)

    for _, group in groupby(sorted(windows, key=alike), key=alike):
        yield from _heard_together(speech, list(group), manner)


def _heard_together(speech: Speech, windows: list[_Window], manner: Manner) -> Iterator[_Running]:
    conditions = windows[0].conditions
    asked = Decoding(
        language=conditions.language,
        task=conditions.task,
        timestamps=conditions.timestamps,
        beam=manner.beam,
        prompt=manner.prompt,
        longest=conditions.longest,
    )
    mel = log_mel([w.audio for w in windows], speech.dims.n_mels, conditions.seconds)
    mel = mel.to(speech.device)
    with torch.no_grad(), _acting(speech, [w.conditions.set for w in windows]):
        states = speech.encode(
            torch.cat([_fused(*pair) for pair in zip(windows, mel, strict=True)])
        )
        results = speech.decode_states(states, asked)
    for window, result, own in zip(windows, results, states, strict=True):
        with torch.no_grad(), _acting(speech, [window.conditions.set]):
            best = _until_likely(speech, own, result, asked)
            found, heard = _segments(speech, window, best, own, manner)
        one = window.of
        one.found.segments += [later(segment, one.at / SAMPLE_RATE) for segment in found]
        if found:
            one.found.language = best.language
        _advance(one, round(heard * SAMPLE_RATE) if heard < window.seconds else len(window.audio))
        yield one


def _fused(window: _Window, mel: Tensor) -> Tensor:
    """[n_mels, t] -> Whisper's input [1, n_mels, t]; by itself, as windows' sets may differ."""
    if window.video is None or window.conditions.fusion is None:
        return mel[None]
    return window.conditions.fusion.restored(mel[None], window.video[None].to(mel.device))


def _acting(speech: Speech, names: Sequence[str | None]) -> AbstractContextManager[None]:
    """These sets, one for each sample; nothing to do on a model without any."""
    if not sets_of(speech.model):
        return nullcontext()
    if len({*names}) == 1:
        return activate(speech.model, names[0])
    return activate(speech.model, per_sample=names)


def _until_likely(
    speech: Speech, states: Tensor, result: DecodingResult, asked: Decoding
) -> DecodingResult:
    """The result, or that of the first temperature that does better; drawn alike every time."""
    devices = [speech.device] if speech.device.type == "cuda" else []
    for temperature in WARMER:
        if not _failed(result):
            return result
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            warm = replace(asked, temperature=temperature, beam=None)
            result = speech.decode_states(states[None], warm)[0]
    return result


def _failed(result: DecodingResult) -> bool:
    repeats = result.compression_ratio > MOST_COMPRESSED
    unlikely = result.avg_logprob < LEAST_LIKELY and result.no_speech_prob <= SILENT
    return bool(repeats or unlikely)


def _segments(
    speech: Speech, window: _Window, result: DecodingResult, states: Tensor, manner: Manner
) -> tuple[list[Segment], float]:
    """Segments by time in the window, and how many seconds of it are thereby heard."""
    if result.no_speech_prob > SILENT and result.avg_logprob <= LEAST_LIKELY:
        return [], window.seconds
    tokenizer = _tokenizer(speech, result.language, window.conditions.task)
    cut, heard = spans(result.tokens, tokenizer.eot, tokenizer.timestamp_begin, window.seconds)
    made = [
        Segment(
            start=span.start,
            end=span.end,
            text=tokenizer.decode(list(span.tokens)),
            tokens=span.tokens,
            avg_logprob=result.avg_logprob,
            no_speech_prob=result.no_speech_prob,
            set=window.conditions.set,
        )
        for span in cut
    ]
    made = [segment for segment in made if segment.text.strip()]
    if made and manner.word_times:
        last = window.of.found.segments[-1].end if window.of.found.segments else 0.0
        silent_since = last - window.of.at / SAMPLE_RATE
        openai = require_word_times(speech)
        made = with_words(openai, tokenizer, made, states, window.seconds, silent_since)
    return made, heard


def _tokenizer(speech: Speech, language: str, task: str) -> Any:
    n_vocab = speech.dims.n_vocab
    return tokenizer_of(n_vocab, language_code(language, n_vocab), task)
