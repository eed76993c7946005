"""Many sets served at once: their factors in one tensor per layer, and an index that chooses.

`activate(per_sample=[...])` takes names, which a compiled model must specialise on. Here the choice
is a tensor, so one compiled graph serves any choice (law 9).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .activation import Active, Routed, overriding
from .drawer import Drawer, drawer_of
from .errors import AdaptError
from .gathered import Part, branch_of, stack_branches
from .layers import FrozenLayer, Rows
from .recipe import Adapter, Branch
from .segmented import resident, serves
from .slots import OutputSlot, Slot


class Stack:
    """Copies of the factors of several frozen sets. Made by `stack`.

    Attaching, loading or changing a set later, or the weights that DoRA's gain is for, does not
    change the copies: stack again.
    """

    def __init__(self, backbone: nn.Module, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.backbone = backbone
        drawer = drawer_of(backbone)
        self.parts: dict[str, list[Part]] = {
            slot.path: parts
            for slot in drawer.slots.values()
            if (parts := _parts(slot, self.names, drawer))
        }

    def index(self, per_sample: Sequence[str | None]) -> Tensor:
        """int64 [batch]: the number of each sample's set, -1 for None."""
        known = {name: n for n, name in enumerate(self.names)} | {None: -1}
        for name in per_sample:
            if name not in known:
                raise AdaptError(f"the stack has no set {name!r}; it has {list(self.names)}")
        device = next(self.backbone.parameters()).device
        numbers = [known[name] for name in per_sample]
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    @contextmanager
    def route(self, index: Tensor) -> Iterator[None]:
        """Within: sample i goes through set `index[i]`, through none where that is -1."""
        if index.dtype != torch.int64 or index.ndim != 1:
            raise AdaptError(
                f"an index is int64 [batch], got {index.dtype} {list(index.shape)}:"
                " stack.index([...]) makes one from names"
            )
        if len(index) and not -1 <= int(index.min()) <= int(index.max()) < len(self.names):
            raise AdaptError(
                f"the index goes from {int(index.min())} to {int(index.max())};"
                f" the stack has sets 0 to {len(self.names) - 1}, and -1 for none"
            )
        drawer = drawer_of(self.backbone)
        self._refuse_changed(drawer)
        with overriding(drawer, Active(routed=Routed(self.names, self.parts, index))):
            yield

    def _refuse_changed(self, drawer: Drawer) -> None:
        """The copies act through the slots of the sets, on the weights that the sets were for."""
        _refuse_merged(drawer)
        for path, parts in self.parts.items():
            if (path, None) not in drawer.slots:
                raise AdaptError(f"no set is attached at {path} any more: stack again")
            (now, then), *_ = [(b.layer.stored.dtype, b.dtype) for b, _ in parts]
            if now != then:
                raise AdaptError(f"{path} is {now} now, {then} when stacked: stack again")


def stack(backbone: nn.Module, names: Sequence[str] | None = None) -> Stack:
    """Put the factors of sets (all attached ones unless named) into one tensor per layer.

    The sets must be frozen (`set.freeze()`, as `load` leaves them) and of methods with a low-rank
    form on the output of linear layers; others are refused by name.

    >>> from polyadapt.core import LoRA, attach
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> for name in ("pets", "cars"):
    ...     attach(model, LoRA(rank=2), at="0", name=name).freeze()
    >>> served = stack(model)
    >>> with served.route(served.index(["cars", None, "pets"])):
    ...     y = model(torch.ones(3, 4))
    """
    drawer = drawer_of(backbone)
    chosen = list(drawer.sets) if names is None else list(names)
    if not chosen or len(set(chosen)) != len(chosen):
        raise AdaptError(f"a stack holds one set or more, each once, got {chosen}")
    for name in chosen:
        if drawer.set_called(name).trainable:
            raise AdaptError(
                f"set {name!r} is trainable, and a stack is a copy that no gradient reaches:"
                " freeze it (set.freeze()), or use activate(per_sample=...)"
            )
    _refuse_merged(drawer)
    with torch.no_grad():
        return Stack(backbone, chosen)


def _refuse_merged(drawer: Drawer) -> None:
    if drawer.merged is not None:
        raise AdaptError(f"set {drawer.merged!r} is merged into the weights: unmerge it first")


def _parts(slot: Slot, names: Sequence[str], drawer: Drawer) -> list[Part]:
    """The stacked branches of each part of one slot's rows; none if no set acts there."""
    by_rows: dict[Rows | None, dict[str, tuple[FrozenLayer, Adapter]]] = {}
    for name in names:
        for layer, adapter in slot.adapters.get(name, ()):
            by_rows.setdefault(layer.rows, {})[name] = (layer, adapter)
    return [_part(slot, names, owners, drawer) for owners in by_rows.values()]


def _part(
    slot: Slot,
    names: Sequence[str],
    owners: dict[str, tuple[FrozenLayer, Adapter]],
    drawer: Drawer,
) -> Part:
    branches: dict[str, Branch] = {}
    for name, (layer, adapter) in owners.items():
        branch = branch_of(adapter, layer) if isinstance(slot, OutputSlot) else None
        if branch is None:
            method = type(drawer.set_called(name).recipe).__name__
            raise AdaptError(
                f"set {name!r} ({method}) has no low-rank form on the output of a linear layer at"
                f" {slot.path}: activate(per_sample=...) runs such sets one after another"
            )
        branches[name] = branch
    first = next(iter(branches.values()))
    none = Branch(first.down[:0], first.up[:, :0])
    layer = next(iter(owners.values()))[0]
    every = [branches.get(name, none) for name in names]
    stacked = resident(layer, every) if serves(layer, every) else stack_branches(layer, every)
    return stacked, torch.tensor([name in owners for name in names], device=first.down.device)
