"""One batch, one set per sample, in two batched products: every sample's own factors, gathered.

What a low-rank method does to the output of a linear layer is y + (g - 1)(y - b) + U D x, with
small D [r, d_in], U [d_out, r] and for some methods a gain g [d_out]. Stacked over the samples
of a batch, the cost does not depend on how many sets there are. Other methods and layer kinds are
run once per set instead (`OutputSlot`). On a GPU, `segmented` gathers nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .banks import read_by
from .layers import FrozenLayer, LinearLayer, Rows, replace_rows
from .recipe import Adapter, Branch, Branching, LowRank, Piece, offers
from .segmented import Ids, Resident, Segmented, resident, serves

Samples = Mapping[str, Sequence[int]]  # by set: the samples of a batch that go through it
_EVER = count(1)


@dataclass(frozen=True)
class Branches:
    """The branches of one part of a layer's rows, one per set or one per sample."""

    layer: FrozenLayer
    down: Tensor  # [n, r, d_in]
    up: Tensor  # [n, r, d_out]: its rows are read one after another
    gain: Tensor | None  # [n, d_out]

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return self.down.dtype

    def pick(self, index: Tensor) -> Branches:
        """Those of `index` [m], in its order."""
        gain = None if self.gain is None else self.gain.index_select(0, index)
        down, up = self.down.index_select(0, index), self.up.index_select(0, index)
        return replace(self, down=down, up=up, gain=gain)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x [n, ..., d_in], y [n, ..., d_out] -> y' of y's shape; entry i through branch i."""
        flat = _tokens(y)
        # Whisper's layers cast their weights to what they are called with.
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        hidden = torch.bmm(_tokens(x), down.mT)
        if self.gain is None:
            return torch.baddbmm(flat, hidden, up).view(y.shape).to(y.dtype)
        base = flat if self.layer.bias is None else flat - self.layer.bias
        changed = (self.gain - 1)[:, None] * base + torch.bmm(hidden, up)
        return (flat + changed).view(y.shape).to(y.dtype)


Part = tuple[Branches | Resident, Tensor]  # of all sets of a stack, and which have one [n]


def _tokens(t: Tensor) -> Tensor:
    """[n, ..., d] -> [n, tokens, d], of no samples, too."""
    return t[:, None] if t.ndim == 2 else t.flatten(1, -2)


@dataclass(frozen=True)
class Chosen:
    """What the samples of a batch need at one part of a layer."""

    branches: Branches  # one per sample of `samples`
    samples: Tensor | None  # the samples that have an adapter here; None: all

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Samples first; a sample without an adapter keeps its bits."""
        if self.samples is None:
            return self.branches.output(x, y)
        own = self.branches.output(x.index_select(0, self.samples), y.index_select(0, self.samples))
        return y.index_copy(0, self.samples, own)


@dataclass(frozen=True)
class Masked:
    """The same when a tensor tells which samples have an adapter: no shape depends on it."""

    branches: Branches  # one per sample
    acts: Tensor  # bool [batch]

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Samples first; a sample without an adapter keeps its bits."""
        acts = self.acts.view(-1, *(1,) * (y.ndim - 1))
        return torch.where(acts, self.branches.output(x, y), y)


Choice = Chosen | Masked | Segmented


def apply(chosen: Sequence[Choice], x: Tensor, y: Tensor, batch_axis: int) -> Tensor:
    """A layer's output with every part changed; `batch_axis` is where samples lie."""
    x, y = x.movedim(batch_axis, 0), y.movedim(batch_axis, 0)
    parts: list[tuple[Rows, Tensor]] = []
    for part in chosen:
        start, stop = part.branches.layer.rows or (0, y.shape[-1])
        if any(start < end and begin < stop for (begin, end), _ in parts):
            y, parts = replace_rows(y, parts, -1), []  # sets may split a layer differently
        parts.append(((start, stop), part.output(x, y[..., start:stop])))
    return replace_rows(y, parts, -1).movedim(0, batch_axis)


def choose(
    adapters: Mapping[str, Sequence[Piece]], samples: Samples, size: int
) -> list[Choice] | None:
    """The factors of each sample, where every set that `samples` names has a branch form."""
    by_part: dict[Rows | None, list[tuple[Piece, Branch, Sequence[int]]]] = {}
    for name, rows in samples.items():
        for layer, adapter in adapters[name]:
            branch = branch_of(adapter, layer)
            if branch is None:
                return None
            by_part.setdefault(layer.rows, []).append(((layer, adapter), branch, rows))
    return [_chosen(entries, size) for entries in by_part.values()]


def routed(
    parts: Sequence[Part], index: Tensor, kept: dict[Any, Any], slot: object
) -> Sequence[Choice]:
    """Each sample's branch of a stack, chosen once per activation unless compiled."""
    if torch.compiler.is_compiling():
        return [_routed(part, index, {}, []) for part in parts]
    made: tuple[list[object], Sequence[Choice]] | None = kept.get(slot)
    mark = _state((), [index])  # another choice may be written into the tensor
    if made is None or made[0] != mark:
        # Outside of inference mode, or what is kept could not be used in training.
        with torch.inference_mode(False), torch.no_grad():
            kept[slot] = made = (mark, [_routed(part, index, kept, mark) for part in parts])
    return made[1]


def _routed(part: Part, index: Tensor, kept: dict[Any, Any], mark: list[object]) -> Choice:
    branches, has = part
    if isinstance(branches, Resident):
        found: tuple[list[object], Ids] | None = kept.get(Ids)  # of all slots
        if found is None or found[0] != mark:
            # A copy: a backward must find what its forward saw.
            kept[Ids] = found = (mark, Ids(index.clone(), len(branches.sets)))
        return Segmented(branches, found[1])
    some = index.clamp_min(0)
    return Masked(branches.pick(some), (index >= 0) & has[some])


@dataclass(frozen=True)
class Kept:
    """A choice for the calls to come, as long as nothing that it was made from has changed."""

    samples: Samples
    chosen: list[Choice] | None
    adapters: Sequence[Adapter]
    read: Sequence[Tensor]
    marks: Sequence[object]

    def fresh(self) -> bool:
        """Same mode, no tensor written since (by version, and by memory).

        Never while a factor trains: an optimiser may write without raising a tensor's version
        (torch's AdamW(fused=True) does).
        """
        trains = True in [t.requires_grad for t in self.read]
        return not trains and self.marks == _state(self.adapters, self.read)


def keep(samples: Samples, chosen: list[Choice] | None, pieces: Sequence[Piece]) -> Kept:
    """`chosen`, made from `pieces`, with what tells later whether it still holds.

    `samples` hold as long as the activation: no set that it names can be detached or merged.
    """
    read: dict[int, Tensor] = {}  # each once: sets share the frozen weight
    if chosen is not None:
        for layer, adapter in pieces:
            read |= {id(t): t for t in (layer.stored, *read_by(adapter))}
    adapters = [adapter for _, adapter in pieces]
    tensors = list(read.values())
    return Kept(samples, chosen, adapters, tensors, _state(adapters, tensors))


def _state(adapters: Sequence[Adapter], read: Sequence[Tensor]) -> list[object]:
    """What changes with the adapters; lists, as it is asked at every call of every layer."""
    return [[a.training for a in adapters], _versions(read), [t.data_ptr() for t in read]]


def _versions(read: Sequence[Tensor]) -> list[int]:
    # Tensors made in inference mode have no version: a number that is never the same again.
    if True in [t.is_inference() for t in read]:
        return [next(_EVER)]
    return [t._version for t in read]


def _chosen(entries: Sequence[tuple[Piece, Branch, Sequence[int]]], size: int) -> Choice:
    (layer, _), _, _ = entries[0]
    owner = {sample: n for n, (_, _, rows) in enumerate(entries) for sample in rows}
    branches = [branch for _, branch, _ in entries]
    if serves(layer, branches):
        ids = torch.tensor([owner.get(s, -1) for s in range(size)], device=layer.stored.device)
        return Segmented(resident(layer, branches), Ids(ids, len(branches)))
    samples = sorted(owner)
    picked = stack_branches(layer, branches)
    device, order = picked.down.device, [owner[s] for s in samples]
    if order != list(range(len(entries))):
        picked = picked.pick(torch.tensor(order, device=device))
    everyone = len(samples) == size
    return Chosen(picked, None if everyone else torch.tensor(samples, device=device))


def branch_of(adapter: Adapter, layer: FrozenLayer) -> Branch | None:
    """What the adapter does to a linear layer's output now, if it has that form."""
    if not isinstance(layer, LinearLayer) or layer.kind == "embedding":
        return None  # other layer kinds have no batched product with one weight per sample
    dropout: float = getattr(adapter, "dropout", 0.0)
    if adapter.training and dropout > 0:
        return None
    if offers(adapter, Branching):
        return cast(Branching, adapter).branch(layer)
    if not offers(adapter, LowRank):
        return None
    a, b, p, scale = cast(LowRank, adapter).factors()
    return Branch(a, b if p is None else b * p, scale)


def stack_branches(layer: FrozenLayer, branches: Sequence[Branch]) -> Branches:
    """Branches of several ranks in one tensor: smaller ones are filled up with zeros."""
    rank, dtype = max(len(b.down) for b in branches), layer.stored.dtype
    down = torch.stack([_filled(b.down, rank) for b in branches])
    up = torch.stack([_filled(b.up.mT, rank) for b in branches])
    if any(b.scale != 1 for b in branches):
        up = up.to(torch.promote_types(up.dtype, dtype))
        scales = torch.tensor([b.scale for b in branches], dtype=up.dtype, device=up.device)
        up = up * scales[:, None, None]
    gain = None
    if any(b.gain is not None for b in branches):
        ones = torch.ones(up.shape[-1], dtype=torch.float32, device=up.device)
        gain = torch.stack([ones if b.gain is None else b.gain for b in branches])
    return Branches(layer, down.to(dtype), up.to(dtype), gain)


def _filled(factor: Tensor, rank: int) -> Tensor:
    return F.pad(factor, (0, 0, 0, rank - len(factor))) if len(factor) < rank else factor
