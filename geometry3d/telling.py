"""How far a long computation is, on stderr."""

from __future__ import annotations

import sys
import time

PATIENCE = 10.0  # seconds between two lines where lines cannot be overwritten


class Telling:
    """Call it with what is done, how much of it, of how much."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.last = time.monotonic()
        self.shown = False

    def __call__(self, what: str, done: int, of: int) -> None:
        now = time.monotonic()
        if now - self.last < (0.1 if self.live else PATIENCE):
            return
        self.last, self.shown = now, self.live
        line = f"{what}: {done} of {of}"
        if self.live:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Before a line that stays."""
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self.shown = False
