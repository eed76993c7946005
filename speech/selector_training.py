"""Train a selector on mixtures that scenes draw, and measure it: confusion, SNR, temperature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import AdaptError
from .audio import HOP, frames_of, log_mel
from .clips import Clip
from .noise import fitted
from .scenes import Scene, seeded
from .selector import Selector

SNR_RANGE = (-15.0, 30.0)  # dB; what lies outside counts as the end
_SHORTEST = 50  # frames of a training crop


@dataclass(frozen=True)
class Examples:
    """Mixtures that are ready to train on: log-mel [n, mels, t], class [n], SNR in dB [n].

    `frames` [n] of the log-mel are a clip's own, the others pad it.
    """

    mel: Tensor
    frames: Tensor
    category: Tensor
    snr_db: Tensor

    def __len__(self) -> int:
        return len(self.mel)


def examples(
    scenes: Mapping[str, Scene],
    clips: Sequence[Tensor | Clip],
    count: int,
    seconds: float = 3.0,
    seed: int = 0,
    n_mels: int = 80,
) -> Examples:
    """`count` mixtures of clean clips with the scenes, each scene as often as another.

    `clips` are samples [n], or clips that are read when they are drawn, whose speaker is then not
    in the noise.

    A clip longer than `seconds` is cut somewhere, a shorter one stays as it is, since the selector
    is to hear such clips. The order of the scenes is the order of the classes. Split speakers and
    recordings before this, not after.
    """
    if not clips or not scenes:
        raise AdaptError(f"{len(clips)} clips and {len(scenes)} scenes give no examples")
    made = [_example(list(scenes.values()), clips, i, seconds, seed) for i in range(count)]
    mixtures, snrs = zip(*made, strict=True)
    return Examples(
        log_mel(mixtures, n_mels, seconds),
        torch.tensor([-(-mixture.numel() // HOP) for mixture in mixtures]),
        torch.arange(count) % len(scenes),
        torch.tensor(snrs).clamp(*SNR_RANGE),
    )


def _example(
    scenes: Sequence[Scene], clips: Sequence[Tensor | Clip], i: int, seconds: float, seed: int
) -> tuple[Tensor, float]:
    generator = seeded("selector", seed, i)
    clip = clips[int(torch.randint(len(clips), (), generator=generator))]
    audio, speaker = (clip, None) if isinstance(clip, Tensor) else (clip.hear(), clip.speaker)
    audio = fitted(audio, min(audio.numel(), frames_of(seconds) * HOP), generator)
    mixture, label = scenes[i % len(scenes)].draw(audio, generator, speaker)
    return mixture, label.snr_db


def train(
    selector: Selector,
    data: Examples,
    steps: int = 300,
    batch_size: int = 32,
    lr: float = 2e-3,
    snr_weight: float = 1.0,
    seed: int = 0,
) -> list[float]:
    """Cross-entropy + MSE(SNR/10) by AdamW with a cosine; returns the losses, in eval mode.

    Each step hears a start of random length of its clips, so that short clips are nothing new.
    """
    generator = seeded("selector-training", seed)
    optimiser = torch.optim.AdamW(selector.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    losses = []
    selector.train()
    for _ in range(steps):
        rows = torch.randint(len(data), (batch_size,), generator=generator)
        found = selector(*_cropped(data.mel[rows], data.frames[rows], generator))
        loss = torch.zeros(())
        if selector.classes:
            loss = loss + F.cross_entropy(found.logits, data.category[rows])
        if selector.snr is not None:
            loss = loss + snr_weight * F.mse_loss(found.snr_db / 10, data.snr_db[rows] / 10)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    selector.eval()
    return losses


def _cropped(mel: Tensor, frames: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    longest = int(frames.max())
    shortest = min(_SHORTEST, longest)
    length = int(torch.randint(shortest, longest + 1, (), generator=generator))
    return mel[..., :length], frames.clamp(max=length)


@dataclass(frozen=True)
class Measured:
    """A selector on examples: confusion counts [true, found], SNR errors, fitted temperature."""

    confusion: Tensor
    snr_error: float
    """Mean absolute error in dB."""
    snr_sigma: float
    """Root of the mean squared error in dB: how unsure a bin's edge is."""
    temperature: float

    @property
    def accuracy(self) -> float:
        """Share of the examples whose class was found."""
        return float(self.confusion.trace() / self.confusion.sum())


@torch.no_grad()
def measure(selector: Selector, data: Examples, batch_size: int = 64) -> Measured:
    """Measure on examples of other speakers and recordings than those of the training."""
    batches = zip(data.mel.split(batch_size), data.frames.split(batch_size), strict=True)
    parts = [selector(mel, frames) for mel, frames in batches]
    logits, snr = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    classes = len(selector.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    if classes:
        place = data.category * classes + logits.argmax(1)
        confusion = place.bincount(minlength=classes**2).view(classes, classes)
    errors = snr - data.snr_db
    return Measured(
        confusion,
        float(errors.abs().mean()),
        float(errors.square().mean().sqrt()),
        fitted_temperature(logits, data.category) if classes else 1.0,
    )


def fitted_temperature(logits: Tensor, category: Tensor) -> float:
    """The divisor of the logits [n, c] under which the true classes are likeliest, 1 to 8.

    Never below 1: examples without an error would make the network surer without bound.

    >>> sure_and_half_wrong = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    >>> fitted_temperature(sure_and_half_wrong, torch.tensor([0, 1]))
    8.0
    """
    tried = [2 ** (step / 8) for step in range(25)]
    losses = [float(F.cross_entropy(logits / t, category)) for t in tried]
    return tried[losses.index(min(losses))] if math.isfinite(min(losses)) else 1.0
