"""The loaders of a data module: its settings are checked, its parts made into batches, one way."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, Protocol, cast

from torch.utils.data import DataLoader, Dataset

from .errors import AdaptError
from .order import EpochAndPosition, EpochSampler


class Batched(Protocol):
    """What a data module says of its batches; num_workers: processes that prepare them."""

    batch_size: int
    num_workers: int
    seed: int


def require_batches(batch_size: int, num_workers: int) -> None:
    """Refuse settings that no loader takes."""
    if batch_size < 1 or num_workers < 0:
        raise AdaptError(f"batch_size={batch_size}, num_workers={num_workers}: from 1 and from 0")


def in_order(module: Batched, data: Sized, **options: Any) -> DataLoader[Any]:
    """All of a data set from its first sample on; `options` are the DataLoader's.

    >>> from types import SimpleNamespace
    >>> module = SimpleNamespace(batch_size=2, num_workers=0, seed=0)
    >>> [batch.tolist() for batch in in_order(module, [10, 20, 30])]
    [[10, 20], [30]]
    """
    whole = cast(Dataset[Any], data)
    return DataLoader(whole, module.batch_size, num_workers=module.num_workers, **options)


def for_training(
    module: Batched, data: Sized, order: EpochSampler | None = None, **options: Any
) -> DataLoader[Any]:
    """Another order every epoch; without one, that of `EpochAndPosition` and the module's seed."""
    if order is None:
        order = EpochAndPosition(len(data), module.seed)
    return in_order(module, data, sampler=order, generator=order.generator, **options)


def for_validation(module: Batched, data: Sized, **options: Any) -> DataLoader[Any] | list[Any]:
    """In order; what Lightning takes for "nothing to validate on" where there are no data."""
    return in_order(module, data, **options) if len(data) else []


def for_test(module: Batched, data: Sized, **options: Any) -> DataLoader[Any]:
    """In order; refuses a part that is empty."""
    if not len(data):
        raise AdaptError("there is no test part: add one, or set test_share above 0")
    return in_order(module, data, **options)
