"""Noise from recordings: the layout of MUSAN, or any folder of audio files; split by recording."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from ..core.errors import AdaptError
from .audio import SAMPLE_RATE
from .noise import FULL, Convention, fitted
from .scenes import USUAL_SNR, Between, Scene, overlay, split

SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aiff", ".aif"})
PARTS = ("train", "validation", "test")
SHARES = (0.8, 0.1, 0.1)
BABBLE = 30

# MUSAN's folder -> the categories made of it, and how many recordings sound at once.
_MUSAN: dict[str, dict[str, int]] = {
    "speech": {"babble": BABBLE, "side": 1},
    "music": {"music": 1},
    "noise": {"noise": 1},
}


@dataclass(frozen=True)
class Recordings:
    """Files by recording (or speaker); a draw is the mean of parts of so many of them.

    A part starts anywhere in a file that is longer, and only that part is read where the file
    allows it. A recording that bears the name of the clip's own speaker is passed over.
    """

    files: Mapping[str, Sequence[Path]]
    at_once: int = 1

    def draw(self, length: int, generator: Generator, without: str | None = None) -> Tensor:
        """fp32 [length] of unit power, or zeros where all the parts are silent."""
        others = [name for name in self.files if name != without]
        if not others:
            raise AdaptError(f"no recording but those of {without!r} to draw noise from")
        order = torch.randperm(len(others), generator=generator)[: self.at_once].tolist()
        return overlay([self._part(others[i], length, generator) for i in order])

    def _part(self, name: str, length: int, generator: Generator) -> Tensor:
        files = self.files[name]
        return read_part(
            files[int(torch.randint(len(files), (), generator=generator))], length, generator
        )


def read_part(path: Path, length: int, generator: Generator) -> Tensor:
    """A random part [length] of an audio file, tiled if the file is shorter."""
    import soundfile

    from .audio import read_audio

    try:
        with soundfile.SoundFile(path) as file:
            if file.samplerate == SAMPLE_RATE and file.channels == 1 and file.frames > length:
                start = torch.randint(file.frames - length + 1, (), generator=generator)
                file.seek(int(start))
                return torch.from_numpy(file.read(length, dtype="float32"))
    except (soundfile.LibsndfileError, TypeError):
        pass  # `read_audio` knows more formats, and says what is wrong
    return fitted(read_audio(path), length, generator)


def recordings(
    folder: str | Path, recording_of: Callable[[Path], str] | None = None
) -> dict[str, list[Path]]:
    """Recording -> its audio files below a folder, at any depth.

    `recording_of` names the recording of a file, for folders in which one recording lies in several
    pieces (ESC-50's `1-1234-A-0.wav`: the second number); by default each file is a recording.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdaptError(f"there is no folder of recordings {folder}")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            name = recording_of(path) if recording_of else str(path.relative_to(folder))
            found.setdefault(name, []).append(path)
    if not found:
        raise AdaptError(
            f"the folder {folder} holds no recording; known are {', '.join(sorted(SUFFIXES))}"
        )
    return found


def folder_scenes(
    folder: str | Path,
    part: str = "train",
    snr_db: Between | tuple[float, ...] = USUAL_SNR,
    convention: Convention = FULL,
    seed: int = 0,
    recording_of: Callable[[Path], str] | None = None,
) -> dict[str, Scene]:
    """Scenes of one part (train, validation, test) of a folder, by category.

    With MUSAN's folders (any of `speech`, `music`, `noise`): babble and side speakers from its
    speech, music, noise. Any other folder is one category that bears its name. Recordings are split
    80/10/10 before anything is cut, so no recording is in two parts.
    """
    folder = Path(folder)
    if part not in PARTS:
        raise AdaptError(f"unknown part {part!r} of a noise folder; allowed: {', '.join(PARTS)}")
    musan = [name for name in _MUSAN if (folder / name).is_dir()]
    wanted = {name: _MUSAN[name] for name in musan} if musan else {"": {folder.resolve().name: 1}}
    made = {}
    for name, categories in wanted.items():
        files = recordings(folder / name, recording_of)
        chosen = split(files, SHARES, seed)[PARTS.index(part)]
        for category, at_once in categories.items():
            source = Recordings({key: files[key] for key in chosen}, at_once)
            made[category] = Scene(category, source, snr_db, convention)
    return made
