"""The order of the data and the random states: what a resumed run must repeat."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from polyadapt.core import order
from polyadapt.core.order import EpochSampler, epoch_loader, random_states, set_random_states


class Noisy(Dataset[Tensor]):
    """Index and a random number: what an augmentation in a worker would draw."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), float(torch.rand(()))])


def batches(loader: DataLoader[Tensor], epoch: int) -> Tensor:
    assert isinstance(loader.sampler, EpochSampler)
    loader.sampler.set_epoch(epoch)
    return torch.cat(list(loader))


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    first, second = EpochSampler(50, seed=3), EpochSampler(50, seed=3)
    _ = [list(second) for _ in range(3)], torch.rand(7), second.generator.seed()
    for epoch in (4, 0, 4):
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        assert list(first) == list(second)
        assert sorted(first) == list(range(50))


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = set()
    for seed in (-1, 0, 1, 2):
        for epoch in range(4):
            sampler = EpochSampler(50, seed=seed)
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 16


def test_a_loader_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    loader = epoch_loader(torch.arange(6), batch_size=2, seed=1)  # type: ignore[arg-type]
    assert sorted(int(n) for batch in loader for n in batch) == [0, 1, 2, 3, 4, 5]
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_draw_the_same_numbers_in_the_same_epoch() -> None:
    one = epoch_loader(Noisy(), batch_size=2, seed=5, num_workers=1)
    again = epoch_loader(Noisy(), batch_size=2, seed=5, num_workers=1)
    _ = batches(again, 0)
    first, second = batches(one, 3), batches(again, 3)
    assert torch.equal(first, second)
    assert not torch.equal(first[:, 1], batches(one, 4)[:, 1])


@pytest.mark.parametrize("length", [12, 11, 1])
def test_processes_divide_the_order_and_their_batches_are_those_of_one(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = EpochSampler(length, seed=2)
    sampler.set_epoch(1)
    alone = list(sampler)
    shares = []
    for process in range(2):
        monkeypatch.setattr(order, "this_process", lambda of=process: (of, 2))
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler) == (length + 1) // 2
    pairs = [index for both in zip(*shares, strict=True) for index in both]
    assert pairs == alone + alone[: length % 2]  # filled up from the beginning


def test_every_process_gets_its_own_random_state_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    states = random_states()
    first = torch.rand(3)
    states += random_states()
    second = torch.rand(3)
    for process, drawn in enumerate((first, second, first)):
        monkeypatch.setattr(order, "this_process", lambda of=process: (of, 3))
        set_random_states(states)
        assert torch.equal(torch.rand(3), drawn)


def test_random_states_come_back() -> None:
    states = random_states()
    drawn = torch.rand(3).tolist(), numpy.random.rand(3).tolist(), random.random()
    _ = torch.rand(5), numpy.random.rand(1), random.random()
    set_random_states(states)
    assert (torch.rand(3).tolist(), numpy.random.rand(3).tolist(), random.random()) == drawn


@pytest.mark.parametrize("length", [40, 43])
def test_batches_of_like_size_hold_every_sample_once(length: int) -> None:
    sizes = [(7 * i) % length for i in range(length)]
    sampler = EpochSampler(length, seed=1, sizes=sizes, batch_size=4, pool=100)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(length))
        spans = [
            max(sizes[i] for i in order[at : at + 4]) - min(sizes[i] for i in order[at : at + 4])
            for at in range(0, length, 4)
        ]
        assert max(spans) == 3, "one pool: neighbours in size are together"
        orders.append(order)
    assert len({tuple(order) for order in orders}) == 3
    assert list(EpochSampler(length, seed=1, sizes=sizes, batch_size=4, pool=100)) == orders[0]
