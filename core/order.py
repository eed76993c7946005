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

    With `sizes`, batches of `batch_size` hold samples of like size: the shuffled order is cut into
    pools of `pool` batches, each is sorted, and the batches are shuffled again.

    >>> sampler = EpochSampler(5, seed=0)
    >>> first = list(sampler)
    >>> sampler.set_epoch(1)
    >>> sorted(sampler) == sorted(first) == [0, 1, 2, 3, 4], list(sampler) == first
    (True, False)
    >>> order = list(EpochSampler(4, seed=0, sizes=[9, 1, 8, 2], batch_size=2))
    >>> sorted([sorted(order[:2]), sorted(order[2:])])
    [[0, 2], [1, 3]]
    """

    # A DistributedSampler, because Lightning wraps any other one when there are several processes,
    # and would shuffle its order once more. Nothing else of that class is used.
    def __init__(
        self,
        length: int,
        seed: int,
        *,
        shuffle: bool = True,
        sizes: Sequence[int] | None = None,
        batch_size: int = 1,
        pool: int = 16,
    ) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.sizes = sizes
        self.batch_size = batch_size
        self.pool = pool
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
        order = _permutation(self.length, own)
        if self.sizes is None:
            return order
        # A batch of all processes together: each takes every n-th sample of it.
        return _like_sized(order, self.sizes, self.batch_size * this_process()[1], self.pool, own)

    def _mixed(self) -> int:
        """A seed of 32 bits: torch's CPU generator ignores the others."""
        return (self.seed * _SPREAD + self.epoch) & 0xFFFFFFFF


class EpochAndPosition(EpochSampler):
    """The order of an `EpochSampler`, with its epoch beside every position.

    The epoch has to travel with the position: a copy of the data set in a worker knows no epoch.
    """

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(self.epoch, position) for position in super().__iter__()])


def _permutation(length: int, generator: Generator) -> list[int]:
    return cast(list[int], torch.randperm(length, generator=generator).tolist())


def _like_sized(
    order: Sequence[int], sizes: Sequence[int], batch: int, pool: int, generator: Generator
) -> list[int]:
    """The order in whole batches of like size; what is left over stays last."""
    pools = _cut(order, batch * pool)
    whole = _cut([i for part in pools for i in sorted(part, key=lambda i: sizes[i])], batch)
    rest = whole.pop() if len(order) % batch else []
    shuffled = [whole[i] for i in _permutation(len(whole), generator)]
    return [i for part in [*shuffled, rest] for i in part]


def _cut(order: Sequence[int], size: int) -> list[Sequence[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


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
