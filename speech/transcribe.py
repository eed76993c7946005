"""`polyadapt speech transcribe`: audio files as text, subtitles or JSON."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.cli import OneLineParser
from ..core.container import write_atomically
from ..core.errors import AdaptError

if TYPE_CHECKING:
    from .segments import Transcript

FORMATS = ("txt", "srt", "vtt", "json")
_PATIENCE = 10.0  # seconds between two lines of progress where lines cannot be overwritten


def main(argv: list[str]) -> int:
    """Transcribe the files that `argv` names; what is heard goes to stdout as it is heard."""
    asked = _parser().parse_args(argv)
    formats = _formats(asked.format, asked.out, asked.files)
    _require_a_video_each(asked.files, asked.video)
    targets = _targets(asked.files, formats, asked.out)
    from .av_data import FilmedClip
    from .ears import Wanted, ears
    from .transcription import Manner, transcribe_all

    manner = Manner(
        batch=asked.batch, beam=asked.beam, word_times=asked.word_times, prompt=asked.prompt
    )
    wanted = Wanted(
        model=asked.model,
        set=asked.set,
        sets=asked.sets,
        select=asked.select,
        language=asked.language,
        task=asked.task,
        timestamps=asked.timestamps,
        filmed=asked.video is not None,
    )
    pairs = zip(asked.files, asked.video or (), strict=False)
    films = [FilmedClip.of_files(*pair) for pair in pairs]
    speech, conditions = ears(wanted)
    told = _Told(asked.files, formats, targets)
    try:
        for number, found in transcribe_all(speech, films or asked.files, conditions, manner):
            told.grown(number, found)
    except KeyboardInterrupt:
        told.interrupted()
        return 130
    return 2 if told.failed else 0


class _Told:
    """Says and writes what is heard: whole files when they are done, the rest when it is over."""

    def __init__(
        self, files: Sequence[Path], formats: Sequence[str], targets: Sequence[Sequence[Path]]
    ) -> None:
        self.files, self.formats, self.targets = files, formats, targets
        self.open: dict[int, Transcript] = {}
        self.said: dict[int, int] = {}  # segments on stdout
        self.failed = 0
        self.progress = _Progress(files)

    def grown(self, number: int, found: Transcript) -> None:
        self.open[number] = found
        if len(self.files) == 1 and self.formats == ["txt"]:
            self._say_new(number, found)
        if found.error is not None:
            self.failed += 1
            self.progress.clear()
            print(f"polyadapt: {found.error}", file=sys.stderr)
            self._end(number, found, partial=bool(found.segments))
        elif found.complete:
            self._end(number, found, partial=False)
        else:
            self.progress.show(number, found)

    def interrupted(self) -> None:
        self.progress.clear()
        if not self.open:
            print("polyadapt: interrupted", file=sys.stderr)
        for number, found in sorted(self.open.items()):
            heard = f"{self.files[number]} is heard up to {_minutes(found.seconds)}"
            print(f"polyadapt: interrupted: {heard}", file=sys.stderr)
            self._end(number, found, partial=True)

    def _end(self, number: int, found: Transcript, partial: bool) -> None:
        """Write a transcript, under another name if it is not whole; not an empty failure."""
        from .subtitles import FORMATS as RENDER

        self.open.pop(number, None)
        self.progress.clear()
        if found.error is not None and not partial:
            return
        for path, kind in zip(self.targets[number], self.formats, strict=False):
            place = path.with_suffix(f".partial.{kind}") if partial else path
            write_atomically(place, RENDER[kind](found).encode())
            if not partial:
                path.with_suffix(f".partial.{kind}").unlink(missing_ok=True)
        self._say_rest(number, found, RENDER)
        if found.complete and not found.segments:
            print(f"polyadapt: no speech is heard in {self.files[number]}", file=sys.stderr)

    def _say_new(self, number: int, found: Transcript) -> None:
        for segment in found.segments[self.said.get(number, 0) :]:
            self.progress.clear()
            print(segment.text.strip(), flush=True)
        self.said[number] = len(found.segments)

    def _say_rest(
        self, number: int, found: Transcript, render: dict[str, Callable[[Transcript], str]]
    ) -> None:
        if self.targets[number] or self.formats == ["txt"]:
            if len(self.files) > 1:
                print(f"{self.files[number]}\t{found.text}", flush=True)
        else:
            print(render[self.formats[0]](found), end="", flush=True)


class _Progress:
    """How far each recording is heard, on stderr."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.live = sys.stderr.isatty()
        self.totals: dict[int, float | None] = {}
        self.last = time.monotonic()
        self.shown = False

    def show(self, number: int, found: Transcript) -> None:
        from .audio import seconds_of

        if not self.live and time.monotonic() - self.last < _PATIENCE:
            return
        self.last = time.monotonic()
        if number not in self.totals:
            self.totals[number] = seconds_of(self.files[number])
        total = self.totals[number]
        of = f" of {_minutes(total)}" if total else ""
        line = f"{self.files[number].name}: {_minutes(found.seconds)}{of}"
        self.shown = self.live
        if self.live:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self.shown = False


def _minutes(seconds: float) -> str:
    """
    >>> _minutes(75.4), _minutes(3 * 3600)
    ('1:15', '3:00:00')
    """
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def _formats(text: str, out: Path | None, files: Sequence[Path]) -> list[str]:
    formats = list(dict.fromkeys(text.split(",")))
    if unknown := [kind for kind in formats if kind not in FORMATS]:
        raise AdaptError(f"--format {unknown[0]!r} is unknown: allowed are {', '.join(FORMATS)}")
    if out is None and (len(formats) > 1 or (formats != ["txt"] and len(files) > 1)):
        raise AdaptError("several files or formats need --out FOLDER: stdout takes one at a time")
    return formats


def _targets(files: Sequence[Path], formats: Sequence[str], out: Path | None) -> list[list[Path]]:
    """The files to write for each recording; two recordings of one name are refused."""
    if out is None:
        return [[] for _ in files]
    if out.exists() and not out.is_dir():
        raise AdaptError(f"--out {out} is not a folder")
    names = [file.stem for file in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise AdaptError(f"two files are called {twice!r}: both cannot be written to {out}")
    out.mkdir(parents=True, exist_ok=True)
    return [[out / f"{name}.{kind}" for kind in formats] for name in names]


def _require_a_video_each(files: Sequence[Path], videos: Sequence[Path] | None) -> None:
    if videos is not None and len(videos) != len(files):
        raise AdaptError(
            f"--video: {len(videos)} videos for {len(files)} files; one for each, in their order"
        )


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt speech transcribe",
        description="Write down what is said in audio files of any length and format.",
        epilog="Ctrl-C keeps what was heard so far, in files called NAME.partial.*.",
    )
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="wav, flac, mp3, ogg, ...")
    add("--set", type=Path, metavar="FILE", help="an adapter set; it names its own Whisper")
    add("--sets", type=Path, metavar="FOLDER", help="a bundle of sets, for other noise each")
    choice = "with --sets: the set of least expected WER for every 30 s, one by name, or none"
    add("--select", default="auto", metavar="auto|NAME|none", help=choice)
    mouths = "with an audio-visual set: for each FILE the mouth crops (.npy, .npz, a video) or"
    add("--video", nargs="+", type=Path, metavar="MOUTH", help=f"{mouths} features at 25 Hz")
    models = "tiny.en, base, ..., turbo; openai/whisper-small; a folder; offline: tiny.en by pip"
    add("--model", metavar="NAME", help=models)
    add("--language", metavar="CODE", help="de, German, ...; default: the set's, or as heard")
    add("--task", choices=("transcribe", "translate"), help="translate: into English")
    placed = "let the model place segments in time; default: as the set was trained"
    add("--timestamps", action=argparse.BooleanOptionalAction, help=placed)
    add("--word-times", action="store_true", help="when each word was said, in JSON")
    add("--prompt", metavar="TEXT", help="taken to precede every window: names to expect")
    add("--beam", type=_positive, metavar="N", help="paths of a beam search; default: greedy")
    add("--batch", type=_positive, default=8, metavar="N", help="files side by side; default: 8")
    add("--format", default="txt", metavar="LIST", help="txt,srt,vtt,json; default: txt")
    add("--out", type=Path, metavar="FOLDER", help="write FOLDER/NAME.FORMAT for every file")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
