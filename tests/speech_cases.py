"""Small clips, manifests and configurations that the tests of the speech domain share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from polyadapt.tests.command_cases import changed
from polyadapt.tests.speech_models import ENGLISH, tiny_whisper

TEXTS = ("seven three", "one", "the cat sat on the mat")


def save_whisper(path: str = "tiny.pt", n_vocab: int = ENGLISH) -> str:
    """A tiny random Whisper as the kind of file that openai-whisper loads."""
    model = tiny_whisper(n_vocab)
    content = {"dims": dataclasses.asdict(model.dims), "model_state_dict": model.state_dict()}
    torch.save(content, path)
    return path


def save_clip(path: str | Path, seconds: float = 0.4, seed: int = 0, rate: int = 16_000) -> Path:
    """A file of noise."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).normal(0, 0.1, int(seconds * rate))
    soundfile.write(path, samples, rate)
    return Path(path)


def save_manifest(path: str = "m.csv", count: int = 12, seconds: float = 0.4) -> str:
    """clips/0.wav, ... and a manifest of them: every sixth clip is a test clip."""
    lines = ["path,text,speaker,split"]
    folder = Path(path).parent
    for index in range(count):
        save_clip(folder / f"clips/{index}.wav", seconds + index % 10 / 100, index)
        part = "test" if index % 6 == 5 else "train"
        lines.append(f"clips/{index}.wav,{TEXTS[index % 3]},s{index % 4},{part}")
    Path(path).write_text("\n".join(lines) + "\n")
    return path


def configuration(**changes: Any) -> dict[str, Any]:
    """LoRA on a tiny random Whisper; `changes` are values by their dotted keys."""
    made: dict[str, Any] = {
        "model": {
            "backbone": {"class_path": "OpenAIWhisper", "init_args": {"name": "tiny.pt"}},
            "adapter": {"class_path": "LoRA", "init_args": {"rank": 2}},
            "seconds": 0.6,
            "longest": 3,
        },
        "data": {
            "class_path": "Manifest",
            "init_args": {"path": "m.csv", "batch_size": 4, "val_share": 0.2},
        },
        "trainer": {"max_epochs": 2, "enable_progress_bar": False, "accelerator": "cpu"},
    }
    return changed(made, **changes)
