"""Making other libraries' models: from a seed, quietly, with their errors in one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError

from .errors import AdaptError

# What other libraries raise for weights that cannot be fetched, for files that are none of theirs,
# and for options of a wrong type or size. The hub's errors are OSErrors.
_STUMBLES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    UnpicklingError,
    ValueError,
)


@contextmanager
def made(what: str) -> Iterator[None]:
    """What another library raises becomes one line; what it logs on the way is in that line."""
    logs = [logging.getLogger(name) for name in (None, "huggingface_hub", "transformers")]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    except AdaptError:  # our own word on it
        raise
    except _STUMBLES as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdaptError(f"cannot load {what}: {cause}") from error
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` and leave the caller's random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
