"""Audio files as 16 kHz mono, piece by piece or whole, and Whisper's log-mel spectrogram."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import AdaptError

SAMPLE_RATE = 16_000
HOP = 160  # samples per frame of the spectrogram: 10 ms
LONGEST = 30.0  # seconds that Whisper hears at once

_PIECE = 10  # seconds decoded at a time: a long recording never lies in memory as a whole
Samples = NDArray[np.float32]


def read_audio(path: str | Path) -> Tensor:
    """The samples [n] of an audio file: mono (the mean of its channels), 16 kHz, float32.

    wav, flac, mp3, ogg and what else libsndfile reads; any other format through ffmpeg where that
    is installed. Resampled by soxr at its high quality.

    Raises AdaptError, one line that names the file, for one that is missing, a folder, not audio,
    cut short, without a sample, or with samples that are NaN or infinite.

    >>> import soundfile
    >>> soundfile.write("beep.wav", np.zeros((4_000, 2)), 8_000)
    >>> read_audio("beep.wav").shape  # half a second
    torch.Size([8000])
    """
    return torch.cat(list(pieces(path)))


def pieces(path: str | Path) -> Iterator[Tensor]:
    """The samples of `read_audio` in pieces of some seconds, for recordings of hours."""
    path = _file(path)
    count = 0
    for block in _decoded(path):
        finite = np.isfinite(block)
        if not finite.all():
            place = (count + int(finite.argmin())) / SAMPLE_RATE
            raise AdaptError(
                f"{path} holds samples that are NaN or infinite, from {place:.1f} s on"
            )
        count += len(block)
        if len(block):
            yield torch.from_numpy(block)
    if not count:
        raise AdaptError(f"{path} holds no sample: there is nothing to hear")


def seconds_of(path: str | Path) -> float | None:
    """How long a recording lasts by its header; None where only decoding it would tell.

    >>> import soundfile
    >>> soundfile.write("beep.wav", np.zeros(4_000), 8_000)
    >>> seconds_of("beep.wav")
    0.5
    """
    import soundfile

    try:
        return float(soundfile.info(path).duration)
    except (soundfile.LibsndfileError, TypeError):
        return None


class Recording:
    """A file, samples [n] or pieces of them, from front to back: what lies behind is let go.

    >>> recording = Recording(torch.arange(40.0))
    >>> recording.window(10, 3), recording.ends_by(39), recording.ends_by(40)
    (tensor([10., 11., 12.]), False, True)
    """

    def __init__(self, source: str | Path | Tensor | Iterator[Tensor]) -> None:
        self.source = source
        if isinstance(source, Iterator):
            self._rest = source
        else:
            self._rest = iter([source]) if isinstance(source, Tensor) else pieces(source)
        self._held = torch.empty(0)
        self._start = 0  # of what is held, in samples

    def window(self, start: int, length: int) -> Tensor:
        """The samples from `start` on, at most `length`; no later call may ask for earlier ones."""
        self._let_go(start)
        while self._start < start and self._read():
            self._let_go(start)
        self._reach(start + length)
        return self._held[:length]

    def ends_by(self, place: int) -> bool:
        """No sample follows from `place` on."""
        self._reach(place + 1)
        return self._start + len(self._held) <= place

    def _let_go(self, place: int) -> None:
        """Of what lies before."""
        gone = min(max(place - self._start, 0), len(self._held))
        self._held = self._held[gone:]
        self._start += gone

    def _reach(self, place: int) -> None:
        while self._start + len(self._held) < place and self._read():
            pass

    def _read(self) -> bool:
        """A further piece, if there is one."""
        piece = next(self._rest, None)
        if piece is not None:
            self._held = torch.cat([self._held, piece.float()])
        return piece is not None


def excerpts(source: str | Path | Tensor, length: int, most: int) -> Iterator[Tensor]:
    """Windows [length] of a file or of samples [n], evenly spaced from its start to its end.

    As many as cover it, at most so many; one that is shorter comes whole.

    >>> [part.tolist() for part in excerpts(torch.arange(9.0), 3, most=2)]
    [[0.0, 1.0, 2.0], [6.0, 7.0, 8.0]]
    """
    if isinstance(source, Tensor) or (seconds := seconds_of(_file(source))) is None:
        source = source if isinstance(source, Tensor) else read_audio(source)
        total = len(source)
    else:
        total = round(seconds * SAMPLE_RATE)
    count = max(1, min(-(-total // length), most))
    recording = Recording(source)
    for start in torch.linspace(0, max(total - length, 0), count).long().tolist():
        yield recording.window(start, length)


def log_mel(clips: Sequence[Tensor], n_mels: int = 80, seconds: float = LONGEST) -> Tensor:
    """Whisper's log-mel spectrogram (arXiv 2212.04356) of each clip [n] -> [b, n_mels, frames].

    Every clip is padded with silence to `seconds` and measured by itself, with openai-whisper's
    own filters: 25 ms windows every 10 ms, log10 of the mel powers, clamped 8 below the clip's
    largest, (x + 4) / 4. So a clip's frames do not depend on who shares its batch.
    `frames` = 100 `seconds`, rounded up to an even number: Whisper's positions are 2 frames.

    Raises AdaptError for a clip longer than `seconds` (cut it first), `seconds` outside of 0 to 30,
    and other numbers of mel bands than 80 and 128.

    >>> log_mel([torch.zeros(16_000), torch.ones(8_000)], seconds=1.5).shape
    torch.Size([2, 80, 150])
    """
    from whisper.audio import log_mel_spectrogram

    frames = frames_of(seconds)
    if n_mels not in (80, 128):
        raise AdaptError(f"Whisper has no filters for {n_mels} mel bands: allowed are 80 and 128")
    if not clips:
        raise AdaptError("log_mel needs at least one clip")
    for clip in clips:
        if clip.ndim != 1 or len(clip) > frames * HOP:
            raise AdaptError(
                f"a clip is samples [n] with n at most {frames * HOP} ({seconds:g} s),"
                f" not {list(clip.shape)}"
            )
    padded = (F.pad(clip.float(), (0, frames * HOP - len(clip))) for clip in clips)
    return torch.stack([log_mel_spectrogram(clip, n_mels) for clip in padded])


def frames_of(seconds: float) -> int:
    """Frames of the spectrogram of so many seconds, rounded up to an even number.

    >>> frames_of(30.0), frames_of(1.25)
    (3000, 126)
    """
    if not 0 < seconds <= LONGEST:
        raise AdaptError(f"Whisper hears more than 0 and at most {LONGEST:g} s, not {seconds:g}")
    return 2 * int(np.ceil(round(seconds * 50, 6)))


def _file(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise AdaptError(f"{path} is a folder, not an audio file")
    if not path.exists():
        raise AdaptError(f"there is no audio file {path}")
    return path


def _decoded(path: Path) -> Iterator[Samples]:
    import soundfile

    try:
        file = soundfile.SoundFile(path)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless .raw
        if shutil.which("ffmpeg"):
            yield from _by_ffmpeg(path)
            return
        cause = str(getattr(error, "error_string", error)).rstrip(".")
        raise AdaptError(
            f"{path} is not audio that libsndfile reads ({cause}); ffmpeg, which knows more"
            " formats, is not installed"
        ) from error
    with file:
        yield from _resampled(file, path)


def _resampled(file: Any, path: Path) -> Iterator[Samples]:
    import soundfile
    import soxr

    stream = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, 1, dtype="float32")
    left = True
    while left:
        try:
            block = file.read(_PIECE * file.samplerate, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AdaptError(f"{path} is damaged or cut short: {error.error_string}") from error
        left = len(block) > 0
        mono = block.mean(axis=1, dtype=np.float32)
        yield mono if file.samplerate == SAMPLE_RATE else stream.resample_chunk(mono, last=not left)


def _by_ffmpeg(path: Path) -> Iterator[Samples]:
    """`file:` keeps ffmpeg from taking a name for an option or for an address of a network."""
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", f"file:{path.resolve()}"]
    command += ["-f", "f32le", "-ac", "1", "-ar", str(SAMPLE_RATE), "-"]
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints) as process,
    ):
        try:
            assert process.stdout is not None
            while data := process.stdout.read(4 * SAMPLE_RATE * _PIECE):
                yield np.frombuffer(data[: len(data) // 4 * 4], dtype="<f4").copy()
            if process.wait():
                complaints.seek(0)
                said = complaints.read().decode(errors="replace").strip().splitlines()
                cause = said[-1] if said else f"exit code {process.returncode}"
                raise AdaptError(f"{path} is not audio that libsndfile or ffmpeg reads: {cause}")
        finally:
            process.kill()  # a reader that stopped early leaves no process behind
