"""A number of threads for a computation whose bits must come again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """The order of a sum depends on the number of threads; the caller gets its own back.

    >>> before = torch.get_num_threads()
    >>> with on_threads(1):
    ...     torch.get_num_threads()
    1
    >>> torch.get_num_threads() == before
    True
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
