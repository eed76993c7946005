"""Whole numbers of a configuration that no library takes: refused by their key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import AdaptError

LARGEST = 2**63 - 1  # of 64 bits with a sign
LARGEST_SEED = 2**32 - 1  # of numpy, which Lightning seeds, too


def refuse_huge(value: Any, key: str = "") -> None:
    """Raise `AdaptError` for a whole number of more than 64 bits, at any depth.

    Python's have no end, those of torch do. `seed_everything` has 32 bits and no sign.

    >>> refuse_huge({"data": {"seed": 2**63 - 1}, "seed_everything": True})
    >>> refuse_huge({"data": [{"seed": 2**64}]})
    Traceback (most recent call last):
        ...
    polyadapt.core.errors.AdaptError: data.0.seed: 18446744073709551616 is not allowed: whole...
    """
    if isinstance(value, Mapping):
        for name, part in value.items():
            refuse_huge(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for place, part in enumerate(value):
            refuse_huge(part, f"{key}.{place}")
    elif isinstance(value, int):
        seed = key == "seed_everything"
        least, most = (0, LARGEST_SEED) if seed else (-LARGEST, LARGEST)
        if not least <= value <= most:
            raise AdaptError(f"{key}: {value} is not allowed: whole numbers, {least} to {most}")
