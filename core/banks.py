"""Banks: tensors that many adapters of one set share.

A method that shares tensors has `Recipe.build_bank(sites, generator)`, called once per set; what it
returns is an ordinary module. The set registers it, and every adapter of the set finds it under
`adapter.bank`, which is not registered: `.to()`, DDP, optimisers and the file see its tensors once,
its gradients are sums over the sites, and a copy's adapters refer to the copy's bank. In
`state_dict` and in the file its tensors are called `.bank/NAME`; no site is called so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from .recipe import Adapter

BANK = ".bank"  # no path of a module starts with a dot


def share(bank: nn.Module | None, adapters: Iterable[Adapter]) -> None:
    """Show the bank to adapters, which do not own it."""
    for adapter in adapters:
        adapter.__dict__["bank"] = bank  # past nn.Module, which would register it


def bank_of(adapters: Mapping[str, Adapter]) -> nn.Module | None:
    """The bank that the adapters of a set share."""
    return next((adapter.bank for adapter in adapters.values()), None)


def owners(bank: nn.Module | None, adapters: Mapping[str, Adapter]) -> dict[str, nn.Module]:
    """Who holds a set's tensors, by the first part of their names: its bank, its adapters."""
    return {**({} if bank is None else {BANK: bank}), **adapters}


def read_by(adapter: Adapter) -> list[Tensor]:
    """The tensors that what an adapter does is made from: its parameters and its bank's."""
    own: list[Tensor] = list(adapter.parameters())
    if adapter.bank is not None:
        own += [*adapter.bank.parameters(), *adapter.bank.buffers()]
    return own
