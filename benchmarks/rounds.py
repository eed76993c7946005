"""Time callables against each other in interleaved rounds; what every benchmark here shares.

A machine that is busy with other things slows all of them alike within a round, so ratios are taken
per round and their median is reported, with the smallest and largest as the spread.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of each callable, one per round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Seconds of one callable."""
        return statistics.median(self.seconds[name])

    def ratios(self, name: str, to: str) -> list[float]:
        """How often `to` fits into `name`, per round."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return [one / other for one, other in pairs]

    def line(self, name: str, to: str) -> str:
        """The median ratio, its spread, and the seconds behind it."""
        ratios = self.ratios(name, to)
        return (
            f"{name}: {statistics.median(ratios):.3g} of {to}"
            f" (spread {min(ratios):.3g} to {max(ratios):.3g}, {len(ratios)} rounds;"
            f" {1e3 * self.median(name):.3g} ms against {1e3 * self.median(to):.3g} ms)"
        )


def interleaved(
    callables: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm: int = 1,
    after: Mapping[str, Callable[[], Any]] | None = None,
) -> Times:
    """Call each once per round, in turn; the first `warm` rounds are not counted.

    `after`: what puts things back after a call of that name, not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    for n in range(warm + rounds):
        for name, call in callables.items():
            begin = time.perf_counter()
            call()
            spent = time.perf_counter() - begin
            if n >= warm:
                seconds[name].append(spent)
            if after and name in after:
                after[name]()
    return Times(seconds)


def one_thread() -> None:
    """Figures of one core: they do not depend on who else is on the machine's others."""
    torch.set_num_threads(1)


def machine(*packages: str) -> str:
    """A line that says where the figures are from."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", *packages))
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s),"
        f" Python {platform.python_version()}, {versions}"
    )
