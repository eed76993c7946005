"""What a resumed run must repeat: the order of the data and the states of the random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence, Sized
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Generator
from torch.utils.data import DataLoader, Dataset, DistributedSampler

_SPREAD = 0x9E3779B1  # odd, so that no (seed, epoch) near another one shares its order


class EpochSampler(DistributedSampler[Any]):
    """Indices 0 .. length - 1 in an order that is a pure function of (seed, epoch).

    Of n processes (torch.distributed), process r gets every n-th index from the r-th on: batches of
    b in each are together the batch of n b that one process would get. A length that n does not
    divide is filled up from the beginning of the order, so that all have the same number.

    Lightning calls `set_epoch` before every epoch; without it each pass has the order of epoch 0.
    `generator` belongs into the DataLoader: its iterators then draw the seeds of their workers from
    it, also a function of (seed, epoch), and leave torch's global generator alone.

    >>> sampler = EpochSampler(5, seed=0)
    >>> first = list(sampler)
    >>> sampler.set_epoch(1)
    >>> sorted(sampler) == sorted(first) == [0, 1, 2, 3, 4], list(sampler) == first
    (True, False)
    """

    # A DistributedSampler, because Lightning wraps any other one when there are several processes,
    # and would shuffle its order once more. Nothing else of that class is used.
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

    def __iter__(self) -> Iterator[Any]:
        order = self._order()
        process, number = this_process()
        return iter(
            [order[place % self.length] for place in range(process, number * len(self), number)]
        )

    def __len__(self) -> int:
        return -(-self.length // this_process()[1])

    def _order(self) -> Sequence[int]:
        if not self.shuffle:
            return range(self.length)
        # Whoever drew from `generator` changes nothing.
        own = Generator().manual_seed(self._mixed())
        return cast(list[int], torch.randperm(self.length, generator=own).tolist())

    def _mixed(self) -> int:
        """A seed of 32 bits: torch's CPU generator ignores the others."""
        return (self.seed * _SPREAD + self.epoch) & 0xFFFFFFFF


def this_process() -> tuple[int, int]:
    """(rank, number of processes) of torch.distributed; (0, 1) without it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


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


def random_states() -> list[dict[str, Any]]:
    """What `set_random_states` puts back, of every process; to be called in all of them."""
    number = this_process()[1]
    if number == 1:
        return [_random_states()]
    states: list[Any] = [None] * number
    dist.all_gather_object(states, _random_states())
    return states


def _random_states() -> dict[str, Any]:
    """The states of torch's (CPU and CUDA), NumPy's and Python's generators as plain values."""
    import numpy

    algorithm, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (algorithm, keys.tolist(), *rest),  # type: ignore[union-attr]
        "python": random.getstate(),
    }


def set_random_states(of_all: Sequence[dict[str, Any]]) -> None:
    """Put back what `random_states` returned; GPUs that are not here any more are left out.

    A process that there was not when they were taken gets those of another one.
    """
    import numpy

    states = of_all[this_process()[0] % len(of_all)]
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
    numpy.random.set_state(states["numpy"])
    random.setstate(states["python"])
