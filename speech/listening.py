"""What a selector hears in a clip: its estimates for the clip's windows, averaged."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import AdaptError
from .audio import HOP, SAMPLE_RATE, excerpts, log_mel
from .bundle_record import Hearing
from .noise import usable
from .selector import Selector

_WINDOW = 30 * SAMPLE_RATE
_MOST_WINDOWS = 8
_SHORTEST = SAMPLE_RATE // 10

Heard = tuple[list[float], float | None]
"""Probabilities of the selector's classes, and the SNR in dB if it tells it."""


def listen(selector: Selector, hearing: Hearing, heard: Tensor | Path) -> Heard | None:
    """Estimates for a file, samples [n] at 16 kHz, or a log-mel [n_mels, frames], unpadded.

    None where there is nothing to hear: silence, or less than 0.1 s. Of a recording longer than
    30 s, up to 8 windows are heard. Raises `AdaptError` for NaN and infinity.
    """
    if isinstance(heard, Tensor) and heard.dim() == 2:
        mels = [heard]
    else:
        mels = _mels(usable(heard) if isinstance(heard, Tensor) else heard, hearing.n_mels)
    if not all(bool(mel.isfinite().all()) for mel in mels):
        raise AdaptError("the log-mel holds NaN or infinite values")
    mels = [mel for mel in mels if bool((mel != mel.flatten()[0]).any())]
    return _estimate(selector, hearing.temperature, mels) if mels else None


def _mels(heard: Tensor | Path, n_mels: int) -> list[Tensor]:
    """Log-mels of evenly spaced windows of at most 30 s, as long as the clip itself."""
    return [
        log_mel([w], n_mels, w.numel() / SAMPLE_RATE)[0, :, : -(-w.numel() // HOP)]
        for w in excerpts(heard, _WINDOW, _MOST_WINDOWS)
        if w.numel() >= _SHORTEST
    ]


@torch.no_grad()
def _estimate(selector: Selector, temperature: float, mels: list[Tensor]) -> Heard:
    found = [selector(mel[None].float().cpu()) for mel in mels]
    logits = torch.cat([estimate.logits for estimate in found])
    classes = (logits / temperature).softmax(1).mean(0).tolist()
    snr = torch.cat([estimate.snr_db for estimate in found]).mean()
    return classes, None if bool(snr.isnan()) else float(snr)
