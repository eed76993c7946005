"""Small filmed clips and configurations that the tests of audio-visual commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from polyadapt.speech.mouth_video import mouth_video
from polyadapt.speech.scenes import seeded
from polyadapt.speech.synthetic import speech_like
from polyadapt.tests.command_cases import changed

WIDTH = 6  # of features
SIZES = {
    "audio_channels": 4,
    "audio_blocks": 2,
    "features": WIDTH,
    "layers": 1,
    "heads": 2,
    "window": 16,
}


def save_film(stem: str, seconds: float = 0.4, seed: int = 0, crops: int | None = None) -> None:
    """stem.wav, a voice, and stem.npy: features that count the pictures, or mouth crops."""
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    voice = speech_like(round(16_000 * seconds), seeded(seed)) / 10
    soundfile.write(f"{stem}.wav", voice.numpy(), 16_000, subtype="FLOAT")
    if crops is None:
        rows = np.arange(round(seconds * 25), dtype=np.float32)[:, None] + seed / 10
        np.save(f"{stem}.npy", np.repeat(rows, WIDTH, 1))
    else:
        np.save(f"{stem}.npy", mouth_video(voice, seeded(seed), crops).numpy())


def save_films(path: str = "films.csv", count: int = 10) -> str:
    """films/0.wav, films/0.npy, ... and a manifest of them."""
    lines = ["audio,video,speaker"]
    for index in range(count):
        save_film(f"films/{index}", 0.4 + index % 3 / 25, index)
        lines.append(f"films/{index}.wav,films/{index}.npy,s{index % 5}")
    Path(path).write_text("\n".join(lines) + "\n")
    return path


def configuration(**changes: Any) -> dict[str, Any]:
    """Stage 1 on a tiny random Whisper; `changes` are values by their dotted keys."""
    made: dict[str, Any] = {
        "model": {
            "backbone": {"class_path": "OpenAIWhisper", "init_args": {"name": "tiny.pt"}},
            "adapter": {"class_path": "LoRA", "init_args": {"rank": 2}},
            "sizes": dict(SIZES),
            "seconds": 0.6,
            "longest": 3,
        },
        "data": {
            "class_path": "FilmedManifest",
            "init_args": {
                "path": "films.csv",
                "batch_size": 4,
                "val_share": 0.2,
                "noise": {"kinds": ["white"], "low": -5, "high": 0},
            },
        },
        "trainer": {"max_epochs": 2, "enable_progress_bar": False, "accelerator": "cpu"},
    }
    return changed(made, **changes)
