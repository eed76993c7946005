"""Speech and noise at an exact signal-to-noise ratio, by a convention that the label names.

With P(v) the power of a signal, the noise gets the gain g = sqrt(P(s) / (P(n) 10^(SNR/10))), so
that 10 log10(P(s) / P(g n)) is the SNR that was asked for. P(n) is that of the part in use, after
tiling or cropping. The two conventions for P differ by several dB, so a label names its own.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from ..core.errors import AdaptError
from .audio import SAMPLE_RATE

CLEAN = "clean"
_FADE = SAMPLE_RATE // 100  # 10 ms
_FRAME, _HOP = 256, 128


@dataclass(frozen=True)
class Full:
    """Power as the mean square of all samples (the convention of arXiv 2406.10082)."""

    def power(self, signal: Tensor) -> float:
        """[n] -> mean of the squares.

        >>> Full().power(torch.tensor([1.0, 0.0, -1.0, 0.0]))
        0.5
        """
        return float(signal.double().square().mean())

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True)
class Active:
    """Power of the loud frames alone (the convention of arXiv 2312.13873, which has 30 dB).

    Hann frames of 256 samples, hop 128; those within `range_db` of the loudest are kept and
    overlap-added, and the mean square of that is the power. A signal shorter than a frame counts
    in full.
    """

    range_db: float = 30.0

    def __post_init__(self) -> None:
        if not self.range_db > 0 or math.isinf(self.range_db):
            raise AdaptError(
                f"an active level of {self.range_db} dB is not allowed: a finite number above 0"
            )

    def power(self, signal: Tensor) -> float:
        """[n] -> mean square of the kept frames.

        >>> pause = torch.cat([torch.ones(16000), torch.zeros(16000)])
        >>> round(Full().power(pause), 1), round(Active().power(pause), 1)
        (0.5, 1.0)
        """
        if signal.numel() < _FRAME:
            return Full().power(signal)
        window = torch.hann_window(_FRAME, dtype=torch.float64)
        frames = signal.double().unfold(0, _FRAME, _HOP) * window
        level = frames.norm(dim=1)
        kept = frames[level >= level.max() * 10 ** (-self.range_db / 20)]
        joined = torch.zeros((len(kept) + 1) * _HOP, dtype=torch.float64)
        joined[:-_HOP] += kept[:, :_HOP].flatten()
        joined[_HOP:] += kept[:, _HOP:].flatten()
        return Full().power(joined)

    def __str__(self) -> str:
        return f"active-{self.range_db:g}"


Convention = Full | Active
FULL = Full()


def convention_named(word: str | Convention) -> Convention:
    """`full`, `active` (30 dB) or `active-40` as what computes the power.

    >>> convention_named("active-40")
    Active(range_db=40.0)
    """
    if isinstance(word, Full | Active):
        return word
    if word in ("full", "active"):
        return Full() if word == "full" else Active()
    found = re.fullmatch(r"active-(\d+(?:\.\d+)?)", word)
    if not found:
        raise AdaptError(
            f"unknown SNR convention {word!r}; allowed: full, active, active-D with D in dB"
        )
    return Active(float(found[1]))


@dataclass(frozen=True)
class Label:
    """What a mixture is: its noise, its SNR in dB, and by which convention."""

    category: str
    snr_db: float = math.inf
    convention: Convention = FULL

    def __str__(self) -> str:
        if math.isinf(self.snr_db):
            return self.category
        return f"{self.category} at {self.snr_db:g} dB ({self.convention})"

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity: clean speech has the SNR null.

        >>> Label("babble", 5.0).to_json()
        {'category': 'babble', 'snr_db': 5.0, 'convention': 'full'}
        """
        snr = None if math.isinf(self.snr_db) else self.snr_db
        return {"category": self.category, "snr_db": snr, "convention": str(self.convention)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Label:
        """The inverse of `to_json`."""
        snr = math.inf if value["snr_db"] is None else float(value["snr_db"])
        return cls(str(value["category"]), snr, convention_named(str(value["convention"])))


def mix(
    speech: Tensor,
    noise: Tensor,
    snr_db: float,
    convention: str | Convention = "full",
    generator: Generator | None = None,
    rate: int = SAMPLE_RATE,
) -> Tensor:
    """Speech [n] with noise [m] at an exact SNR: [n], fp32, at most 1 in size.

    Noise that is longer is cut, at a random place if there is a generator and at its start if not;
    noise that is shorter is tiled. Silent speech comes back as it is: it has no SNR.
    Raises AdaptError for a signal that is silent noise, NaN, stereo, of integers or not at 16 kHz.

    >>> s, n = torch.tensor([1.0, -1, 1, -1]) / 4, torch.tensor([2.0, 0, -2, 0])
    >>> 4 * mix(s, n, 10)
    tensor([ 1.4472, -1.0000,  0.5528, -1.0000])
    """
    said, added = scaled(speech, noise, snr_db, convention, generator, rate)
    return said + added


def scaled(
    speech: Tensor,
    noise: Tensor,
    snr_db: float,
    convention: str | Convention = "full",
    generator: Generator | None = None,
    rate: int = SAMPLE_RATE,
) -> tuple[Tensor, Tensor]:
    """The two parts [n] whose sum is the mixture; both are scaled down where the sum would clip."""
    speech, noise = usable(speech, "speech", rate), usable(noise, "noise", rate)
    noise = fitted(noise, speech.numel(), generator)
    if not speech.any():
        return speech, torch.zeros_like(speech)
    gain = _gain(speech, noise, snr_db, convention_named(convention))
    said, added = speech.double(), noise.double() * gain
    peak = max(float((said + added).abs().max()), 1.0)
    return (said / peak).float(), (added / peak).float()


def _gain(speech: Tensor, noise: Tensor, snr_db: float, convention: Convention) -> float:
    if not -100 <= snr_db <= 100:  # NaN too
        raise AdaptError(f"an SNR of {snr_db} dB is not allowed: from -100 to 100 dB")
    wanted = convention.power(speech) / 10 ** (snr_db / 10)
    found = convention.power(noise)
    if not found:
        raise AdaptError(
            "the noise is silent where it is used, so no gain gives an SNR: draw again"
        )
    return math.sqrt(wanted / found)


def usable(signal: Tensor, what: str = "audio", rate: int = SAMPLE_RATE) -> Tensor:
    """The signal as fp32 [n], if it is one that can be mixed.

    >>> usable(torch.zeros(2, 100), "noise")
    Traceback (most recent call last):
        ...
    polyadapt.core.errors.AdaptError: the noise has shape [2, 100]: one channel [n] is allowed
    """
    if rate != SAMPLE_RATE:
        raise AdaptError(
            f"the {what} has {rate} samples a second: resample it to {SAMPLE_RATE} first"
        )
    if signal.dim() != 1:
        raise AdaptError(f"the {what} has shape {list(signal.shape)}: one channel [n] is allowed")
    if not signal.numel():
        raise AdaptError(f"the {what} is empty: at least one sample is needed")
    if not signal.is_floating_point():
        raise AdaptError(f"the {what} is {signal.dtype}: floating point from -1 to 1 is allowed")
    if not bool(signal.isfinite().all()):
        raise AdaptError(f"the {what} holds NaN or infinite samples")
    return signal.detach().float()


def fitted(signal: Tensor, length: int, generator: Generator | None = None) -> Tensor:
    """[m] -> [length]: cropped, or repeated with equal-power cross-fades of 10 ms at the seams.

    Without a generator the part starts at sample 0 (for tests), else anywhere (for training).

    >>> fitted(torch.arange(5.0), 3)
    tensor([0., 1., 2.])
    """
    if signal.numel() == length:
        return signal
    if signal.numel() > length:
        starts = signal.numel() - length + 1
    else:
        starts = signal.numel()
        signal = _tiled(signal, length + starts)
    start = int(torch.randint(starts, (), generator=generator)) if generator else 0
    return signal[start : start + length]


def _tiled(signal: Tensor, length: int) -> Tensor:
    """At least `length` samples; each copy overlaps the one before by the fade."""
    fade = min(_FADE, signal.numel() // 2)
    period = signal.numel() - fade
    angle = (torch.arange(fade) + 0.5) / max(fade, 1) * (math.pi / 2)
    seam = signal[:fade] * angle.sin() + signal[period:] * angle.cos()
    later = torch.cat([seam, signal[fade:period]])
    return torch.cat([signal[:period], later.repeat(math.ceil(length / period))])
