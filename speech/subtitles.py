"""Transcripts as txt, srt, vtt and json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

from .segments import Segment, Transcript


def txt(transcript: Transcript) -> str:
    """One line for each segment."""
    return "".join(f"{segment.text.strip()}\n" for segment in transcript.segments)


def srt(transcript: Transcript) -> str:
    """SubRip: numbered, hours:minutes:seconds,milliseconds.

    >>> print(srt(Transcript(segments=[Segment(0.5, 3661.25, " Hello.")])))
    1
    00:00:00,500 --> 01:01:01,250
    Hello.
    <BLANKLINE>
    """
    cues = (
        f"{number}\n{_clock(segment.start)} --> {_clock(segment.end)}\n{_shown(segment)}\n"
        for number, segment in enumerate(transcript.segments, start=1)
    )
    return "\n".join(cues)


def vtt(transcript: Transcript) -> str:
    """WebVTT; `&` and `<` are escaped, as it asks."""
    cues = (
        f"{_clock(segment.start, '.')} --> {_clock(segment.end, '.')}\n{_escaped(segment)}\n"
        for segment in transcript.segments
    )
    return "\n".join(["WEBVTT\n", *cues])


def as_json(transcript: Transcript) -> str:
    """Everything: text, language, segments with words and probabilities, whether it is whole."""
    segments = [
        {k: v for k, v in dataclasses.asdict(s).items() if v is not None}
        for s in transcript.segments
    ]
    record = {
        "text": transcript.text,
        "language": transcript.language,
        "seconds": transcript.seconds,
        "complete": transcript.complete,
        "segments": segments,
    }
    return json.dumps(record, ensure_ascii=False, indent=1) + "\n"


FORMATS: dict[str, Callable[[Transcript], str]] = {
    "txt": txt,
    "srt": srt,
    "vtt": vtt,
    "json": as_json,
}


def _clock(seconds: float, mark: str = ",") -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{mark}{rest % 1000:03}"


def _shown(segment: Segment) -> str:
    """One line without the arrow that would begin a cue."""
    return " ".join(segment.text.split()).replace("-->", "->")


def _escaped(segment: Segment) -> str:
    return _shown(segment).replace("&", "&amp;").replace("<", "&lt;")
