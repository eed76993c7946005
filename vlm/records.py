"""What one run of a few-shot comparison found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Record:
    """A number, and what it needs beside it to be compared with another."""

    method: str
    shots: int
    seed: int
    backbone: str
    data: str
    template: str
    classes: int
    train_images: int
    test_images: int
    top1: float
    trainable: int
    stored: int
    steps: int
    seconds: float
    memory_mib: float | None
    """torch's peak on a GPU while training; None on a CPU, whose peak would be the process's."""
    settings: str
    """SHA-256 of all settings."""
