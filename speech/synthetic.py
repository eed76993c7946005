"""Sounds that need no download: like speech, babble, music, machines, nature. Ours, seeded, 16 kHz.

Each function takes a length in samples and a generator and returns fp32 [length] of unit power.
They stand in for recordings in tests and trials; figures reached with them are figures on synthetic
noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from .audio import SAMPLE_RATE

_FFT, _HOP = 512, 256
_TALKERS = 30  # as the babble of AV-HuBERT's recipe


def speech_like(length: int, generator: Generator, voices: int = 1) -> Tensor:
    """The mean of so many voices: pulses at 90 to 250 Hz through 3 resonators, gated at 3 to 5 Hz.

    Pitch and resonances wander slowly; a little breath noise fills the gaps between the harmonics.

    >>> speech_like(16000, Generator().manual_seed(0)).shape
    torch.Size([16000])
    """
    window, pulses = torch.hann_window(_FFT), _pulses(voices, length, generator)
    excited = torch.stft(
        pulses, _FFT, _HOP, window=window, pad_mode="constant", return_complex=True
    )
    shaped = excited * _resonance(voices, excited.shape[-1], generator)
    spoken = torch.istft(shaped, _FFT, _HOP, window=window, length=length)
    gated = spoken * _syllables(voices, length, generator)
    return unit_power((gated / _rms(gated)).mean(0))


def babble(length: int, generator: Generator) -> Tensor:
    """30 voices at once, all equally loud."""
    return speech_like(length, generator, _TALKERS)


def side_speaker(length: int, generator: Generator) -> Tensor:
    """One other voice."""
    return speech_like(length, generator)


def music(length: int, generator: Generator) -> Tensor:
    """Chords of three bright tones that decay, on a grid of beats, and a drum of noise on each."""
    beat = int(SAMPLE_RATE * _between(0.2, 0.5, generator))
    root = _between(130, 390, generator)
    skipped = int(torch.randint(beat, (), generator=generator))  # it may begin within a beat
    count = math.ceil((length + skipped) / beat)
    degrees = torch.randint(0, 7, (count, 1), generator=generator) + torch.tensor([0, 2, 4])
    scale = torch.tensor([0, 2, 4, 5, 7, 9, 11])
    pitch = root * 2 ** ((scale[degrees % 7] + 12 * (degrees // 7)) / 12)
    time = torch.arange(beat) / SAMPLE_RATE
    bright = _between(0.6, 0.9, generator)
    played = torch.zeros(count, beat)
    for harmonic in range(1, 11):
        tones = torch.sin(2 * math.pi * harmonic * pitch[..., None] * time).sum(1)
        played += bright**harmonic * tones
    attack = (time / 0.005).clamp(max=1)
    played *= attack * torch.exp(-time * _between(2, 8, generator))
    drum = torch.randn(count, beat, generator=generator) * torch.exp(-40 * time)
    return unit_power((played + drum).flatten()[skipped : skipped + length])


def white(length: int, generator: Generator) -> Tensor:
    """The same power at every frequency."""
    return coloured(length, generator, 0.0)


def pink(length: int, generator: Generator) -> Tensor:
    """Power as 1/f."""
    return coloured(length, generator, 1.0)


def brown(length: int, generator: Generator) -> Tensor:
    """Power as 1/f^2."""
    return coloured(length, generator, 2.0)


def stationary(length: int, generator: Generator) -> Tensor:
    """White, pink or brown, whichever the generator draws."""
    return coloured(length, generator, float(torch.randint(0, 3, (), generator=generator)))


def coloured(length: int, generator: Generator, exponent: float) -> Tensor:
    """Gaussian noise with power as 1/f^exponent above 20 Hz."""
    spectrum = torch.fft.rfft(torch.randn(length, generator=generator))
    frequency = torch.fft.rfftfreq(length, 1 / SAMPLE_RATE).clamp(min=20.0)
    return unit_power(torch.fft.irfft(spectrum * frequency ** (-exponent / 2), n=length))


def engine(length: int, generator: Generator) -> Tensor:
    """The harmonics of a slowly moving 40 to 160 Hz, beating, over a low rumble."""
    speed = _wander(1, length, 40, 160, 1.0, generator)[0]
    phase = 2 * math.pi * (speed / SAMPLE_RATE).double().cumsum(0)
    weights = torch.rand(24, generator=generator) * 0.93 ** torch.arange(24)
    shifts = 2 * math.pi * torch.rand(24, generator=generator)
    hum = torch.zeros(length)
    for number, (weight, shift) in enumerate(zip(weights, shifts, strict=True), 1):
        hum += weight * torch.sin(number * phase + shift).float()
    beating = 1 + 0.5 * torch.sin(phase / 2).float()
    return unit_power(unit_power(hum * beating) + 0.3 * brown(length, generator))


def natural(length: int, generator: Generator) -> Tensor:
    """Coloured noise (1/f^0 to 1/f^2) with random bursts: drops, steps, rustling, barks."""
    bed = coloured(length, generator, _between(0, 2, generator))
    sound = coloured(length, generator, _between(0, 1, generator))
    count = 1 + int(_between(2, 8, generator) * length / SAMPLE_RATE)
    starts = torch.randint(0, length, (count,), generator=generator)
    strength = torch.rand(count, generator=generator)
    envelope = torch.zeros(length)
    for start, strong in zip(starts.tolist(), strength.tolist(), strict=True):
        burst = torch.arange(min(length - start, 2 * SAMPLE_RATE)) / SAMPLE_RATE
        faded = torch.exp(-burst / _between(0.02, 0.2, generator))
        envelope[start : start + len(burst)] += strong * faded
    return unit_power(0.2 * bed + sound * envelope)


GENERATORS: dict[str, Callable[[int, Generator], Tensor]] = {
    "babble": babble,
    "brown": brown,
    "engine": engine,
    "music": music,
    "natural": natural,
    "pink": pink,
    "side": side_speaker,
    "stationary": stationary,
    "white": white,
}


def unit_power(signal: Tensor) -> Tensor:
    """Scaled to a mean square of 1; silence stays silence."""
    return signal / _rms(signal)


def _rms(signal: Tensor) -> Tensor:
    return signal.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)


def _pulses(voices: int, length: int, generator: Generator) -> Tensor:
    """[voices, length]: one pulse a period, and breath."""
    pitch = _wander(voices, length, 90, 250, 2.0, generator)
    start = torch.rand(voices, 1, generator=generator)
    turns = (start + (pitch / SAMPLE_RATE).double().cumsum(1)).floor()
    pulses = torch.diff(turns, dim=1, prepend=torch.zeros(voices, 1)).float()
    return pulses + 0.03 * torch.randn(voices, length, generator=generator)


def _resonance(voices: int, frames: int, generator: Generator) -> Tensor:
    """[voices, frequencies, frames]: the gain of three resonators that move."""
    frequency = torch.linspace(0, SAMPLE_RATE / 2, _FFT // 2 + 1)[:, None]
    gain = torch.zeros(voices, len(frequency), frames)
    for low, high, width, weight in (
        (300, 900, 90, 1.0),
        (900, 2300, 120, 0.5),
        (2300, 3200, 180, 0.25),
    ):
        centre = _wander(voices, frames, low, high, 4.0 * _HOP, generator)[:, None]
        gain += weight / (1 + ((frequency - centre) / width).square())
    return gain


def _syllables(voices: int, length: int, generator: Generator) -> Tensor:
    """[voices, length] from 0 to 1: open and shut 3 to 5 times a second, with soft edges."""
    speed = 3 + 2 * torch.rand(voices, 1, generator=generator)
    shift = 2 * math.pi * torch.rand(voices, 1, generator=generator)
    swing = torch.sin(2 * math.pi * speed * torch.arange(length) / SAMPLE_RATE + shift)
    depth = _wander(voices, length, -0.5, 0.9, 2.0, generator)
    return torch.sigmoid(8 * (swing - depth * 0.5))


def _wander(
    voices: int, length: int, low: float, high: float, speed: float, generator: Generator
) -> Tensor:
    """[voices, length] between low and high, turning about `speed` times in SAMPLE_RATE samples."""
    corners = max(2, math.ceil(length * speed / SAMPLE_RATE) + 1)
    path = torch.rand(voices, 1, corners, generator=generator)
    smooth = torch.nn.functional.interpolate(path, length, mode="linear", align_corners=True)
    return low + (high - low) * smooth[:, 0]


def _between(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
