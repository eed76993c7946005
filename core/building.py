"""Making other libraries' models: from a seed, quietly, with their errors in one line."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

from .errors import AdaptError

M = TypeVar("M", bound=nn.Module)

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
    except stumbles() as error:
        cause = first_line(error)
        raise AdaptError(f"cannot load {what}: {cause}") from error
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)


def stumbles() -> tuple[type[Exception], ...]:
    """What other libraries, as far as they are loaded, raise for what they are given."""
    hub = sys.modules.get("huggingface_hub.errors")  # for settings of a wrong type; no ValueError
    strict = getattr(hub, "StrictDataclassError", None)
    return _STUMBLES if strict is None else (*_STUMBLES, strict)


def first_line(error: Exception) -> str:
    """What an error says first; after a colon that is in its second line.

    >>> first_line(ValueError("Validation error for field 'n_head':\\n    TypeError: no int"))
    "Validation error for field 'n_head': TypeError: no int"
    """
    lines = str(error).splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def whole(make: Callable[[], M], what: object) -> M:
    """The model that is made, unless a size of 0 has left a parameter of it without a number."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # told of below
        model = make()
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            shape = list(parameter.shape)
            raise AdaptError(f"{what} is not allowed: its parameter {name} {shape} is empty")
    return model


def refuse_code(options: Mapping[str, Any]) -> None:
    """Refuse options of other libraries that let files of weights or data run what they like."""
    for name, safe in (("weights_only", True), ("trust_remote_code", False)):
        if options.get(name, safe) is not safe:
            said = options[name]
            raise AdaptError(f"{name}={said!r} is not allowed: only files without code are read")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` and leave the caller's random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
