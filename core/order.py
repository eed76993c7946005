"""What a resumed run must repeat: the order of the data and the states of the random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Generator
from torch.utils.data import DataLoader, Dataset, Sampler

_SPREAD = 0x9E3779B1  # odd, so that no (seed, epoch) near another one shares its order


class EpochSampler(Sampler[int]):
    """Indices 0 .. length - 1 in an order that is a pure function of (seed, epoch).

    Lightning calls `set_epoch` before every epoch; without it each pass has the order of epoch 0.
    `generator` belongs into the DataLoader: its iterators then draw the seeds of their workers from
    it, also a function of (seed, epoch), and leave torch's global generator alone.

    >>> sampler = EpochSampler(5, seed=0)
    >>> first = list(sampler)
    >>> sampler.set_epoch(1)
    >>> sorted(sampler) == sorted(first) == [0, 1, 2, 3, 4], list(sampler) == first
    (True, False)
    """

    def __init__(self, length: int, seed: int, *, shuffle: bool = True) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.generator = Generator()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Give the next passes the order of this epoch."""
        self.epoch = epoch
        self.generator.manual_seed(self._mixed())

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(self.length))
        own = Generator().manual_seed(
            self._mixed()
        )  # whoever drew from `generator` changes nothing
        return iter(torch.randperm(self.length, generator=own).tolist())

    def __len__(self) -> int:
        return self.length

    def _mixed(self) -> int:
        """A seed of 32 bits: torch's CPU generator ignores the others."""
        return (self.seed * _SPREAD + self.epoch) & 0xFFFFFFFF


def epoch_loader(
    data: Dataset[Any], batch_size: int, seed: int, *, shuffle: bool = True, **options: Any
) -> DataLoader[Any]:
    """A DataLoader over `data` in the order of an `EpochSampler`; `options` are the DataLoader's.

    >>> loader = epoch_loader([10, 20, 30], batch_size=2, seed=0, shuffle=False)
    >>> [batch.tolist() for batch in loader]
    [[10, 20], [30]]
    """
    assert isinstance(data, Sized), "an order needs a length"
    sampler = EpochSampler(len(data), seed, shuffle=shuffle)
    return DataLoader(data, batch_size, sampler=sampler, generator=sampler.generator, **options)


def random_states() -> dict[str, Any]:
    """The states of torch's (CPU and CUDA), NumPy's and Python's generators as plain values."""
    import numpy

    algorithm, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (algorithm, keys.tolist(), *rest),  # type: ignore[union-attr]
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` returned; GPUs that are not here any more are left out."""
    import numpy

    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
    numpy.random.set_state(states["numpy"])
    random.setstate(states["python"])
