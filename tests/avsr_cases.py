"""What the tests of audio-visual sets share: a tiny task, a batch, a short fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from polyadapt.core import LoRA
from polyadapt.speech.av_data import Pairs
from polyadapt.speech.avsr import AudioVisualDistillation
from polyadapt.speech.backbones import Backbone
from polyadapt.speech.fusion import FusionSizes
from polyadapt.tests.speech_models import tiny_speech, tiny_whisper

SIZES = FusionSizes(audio_channels=4, audio_blocks=2, features=6, layers=1, heads=2, window=16)


@dataclass(frozen=True, kw_only=True)
class TinyWhisper(Backbone):
    def build(self) -> nn.Module:
        model: nn.Module = tiny_whisper()
        return model


def pairs(batch: int = 2, frames: int = 40, seen: int = 32) -> Pairs:
    """Clips of `seen` and `seen - 4` frames in a context of `frames`."""
    drawn = torch.Generator().manual_seed(3)
    noisy, clean = torch.randn(2, batch, 80, frames, generator=drawn)
    video = torch.randn(batch, seen // 4, 6, generator=drawn)
    return Pairs(noisy, clean, video, torch.tensor([seen - 4 * n for n in range(batch)]))


def task(stage: int = 1, **more: Any) -> AudioVisualDistillation:
    settings = {"sizes": SIZES, "seed": 0, "longest": 3, **more}
    return AudioVisualDistillation(TinyWhisper(), LoRA(rank=2), stage=stage, **settings)


def plain_states(mel: Tensor) -> Tensor:
    with torch.no_grad():
        return tiny_speech().encode(mel)


class Rates(Callback):
    """The learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def fit(one: AudioVisualDistillation, folder: Path, steps: int = 2) -> list[float]:
    """The learning rates of the steps."""
    rates = Rates()
    data: DataLoader[Any] = DataLoader([pairs()] * steps, batch_size=None)  # type: ignore[arg-type]
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[rates],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(one, data, data)
    return rates.seen
