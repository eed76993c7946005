"""Which images are used for what: a validation share, a few per class, always by seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Generator

from ..errors import AdaptError


def split_off(
    labels: Sequence[int], indices: Sequence[int], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Divide indices into (kept, split off): round(share * n) of them, every class in proportion.

    >>> kept, off = split_off([0, 0, 0, 0, 1, 1, 1, 1], range(8), 0.25, seed=0)
    >>> len(kept), sorted([0, 0, 0, 0, 1, 1, 1, 1][i] for i in off)
    (6, [0, 1])
    """
    if not 0 <= share < 1:
        raise AdaptError(f"a share of {share} cannot be split off: from 0, below 1")
    size = Counter(labels[i] for i in indices)
    seen: Counter[int] = Counter()
    place: dict[int, float] = {}
    for index in _shuffled(indices, seed):
        label = labels[index]
        place[index] = (seen[label] + 0.5) / size[label]  # how far down its own class it comes
        seen[label] += 1
    order = sorted(place, key=lambda index: place[index])
    count = round(share * len(order))
    return sorted(order[count:]), sorted(order[:count])


def few_per_class(
    labels: Sequence[int], indices: Sequence[int], shots: int, seed: int
) -> list[int]:
    """`shots` indices of every class; a class that has fewer is refused by its number.

    >>> few_per_class([0, 1, 0, 1, 0], range(5), shots=2, seed=0)
    [0, 1, 3, 4]
    """
    if shots < 1:
        raise AdaptError(f"shots={shots} is not allowed: a whole number from 1")
    chosen: list[int] = []
    taken: Counter[int] = Counter()
    for index in _shuffled(indices, seed):
        if taken[labels[index]] < shots:
            taken[labels[index]] += 1
            chosen.append(index)
    for label, count in sorted(taken.items()):
        if count < shots:
            raise AdaptError(f"shots={shots}: class {label} has only {count} training images")
    return sorted(chosen)


def _shuffled(indices: Sequence[int], seed: int) -> list[int]:
    order = torch.randperm(len(indices), generator=Generator().manual_seed(seed))
    return [indices[i] for i in order.tolist()]
