"""Which sets act: the model's default, a context's override, or what a recomputed forward saw.

Law 10. Activation checkpointing runs parts of a forward again during backward, perhaps in another
thread, after the `with` block, or under another set. Every module between the root and a slot
therefore stamps its outputs: a prehook on the output's autograd node notes, when backward gets
there, which sets the forward used. Whatever is recomputed behind that node asks the note.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import AdaptError, ReplayError

if TYPE_CHECKING:
    from torch.autograd.graph import Node

    from .drawer import Drawer
    from .gathered import Part


@dataclass(frozen=True, eq=False)
class Routed:
    """A stack's factors by layer path, and the number of each sample's set [batch]."""

    names: tuple[str, ...]
    parts: Mapping[str, Sequence[Part]]
    index: Tensor


@dataclass(frozen=True)
class Active:
    """The sets that act on a call: `names` in order on every sample, or one per sample."""

    names: tuple[str, ...] = ()
    per_sample: tuple[str | None, ...] | None = None
    routed: Routed | None = None
    kept: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """By slot: what a mixed batch needs there, gathered once for all calls of the activation."""

    def uses(self, name: str) -> bool:
        """The set of that name may act."""
        routed = () if self.routed is None else self.routed.names
        return name in self.names or name in (self.per_sample or ()) or name in routed

    def held(self) -> Active:
        """What a forward that is recomputed asks: the index as it was, whatever it becomes."""
        if self.routed is None:
            return self
        index = self.routed.index
        version = None if index.is_inference() else index._version
        made: tuple[int | None, Active] | None = self.kept.get(_INDEX)
        if made is None or version is None or made[0] != version:
            routed = replace(self.routed, index=index.clone())
            self.kept[_INDEX] = made = (version, Active(routed=routed))
        return made[1]


_INDEX = -1  # no slot's id
_threads = threading.local()
# One entry per backbone (by the identity of its drawer): contexts of several models may nest.
_OVERRIDES: ContextVar[tuple[tuple[int, Active], ...]] = ContextVar("overrides", default=())
# What a WeightSlot imposes while it runs its reader once per set; stronger than a replay.
_IMPOSED: ContextVar[tuple[tuple[int, Active], ...]] = ContextVar("imposed", default=())

_MOST_RECORDS = 64  # a backward that raises leaves its record; graph task ids are never used again


@contextmanager
def activate(
    backbone: nn.Module,
    names: str | Sequence[str] | None = None,
    *,
    per_sample: Sequence[str | None] | None = None,
) -> Iterator[None]:
    """Use other adapter sets for the calls of this context, in this thread only.

    `names`: one name, several (they act one after another), or None for the untouched backbone;
    `per_sample`: one name or None for each sample of the batch. Unknown names are refused.
    Backward may run anywhere and any time later, also through activation checkpoints. One limit: a
    block that was compiled by itself *inside* an eager checkpoint cannot ask which forward it
    belongs to; compile around the checkpoint instead.

    >>> from polyadapt.core import LoRA, activate, attach
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> _ = attach(model, LoRA(rank=2), at="0", name="pets")
    >>> with activate(model, None):
    ...     y = model(torch.ones(1, 4))
    """
    from .drawer import drawer_of

    drawer = drawer_of(backbone)
    with overriding(drawer, drawer.checked(wanted(names, per_sample))):
        yield


@contextmanager
def overriding(drawer: Drawer, active: Active) -> Iterator[None]:
    """Within, and in this thread only: these sets instead of the default."""
    token, mine = _OVERRIDES.set((*_OVERRIDES.get(), (id(drawer), active))), object()
    drawer.open[mine] = active
    try:
        yield
    finally:
        drawer.open.pop(mine, None)
        _OVERRIDES.reset(token)


def wanted(
    names: str | Sequence[str] | None, per_sample: Sequence[str | None] | None = None
) -> Active:
    """Read the arguments of `activate`; they are checked against a backbone elsewhere."""
    if per_sample is not None:
        if names is not None:
            raise AdaptError("give either names for the whole batch or per_sample, not both")
        return Active((), tuple(per_sample))
    if names is None:
        return Active()
    chosen = (names,) if isinstance(names, str) else tuple(names)
    if len(set(chosen)) != len(chosen):
        raise AdaptError(f"a set can act once at a time, got {list(chosen)}")
    return Active(chosen)


def current(drawer: Drawer) -> Active:
    """The sets that act here and now."""
    imposed = _last(_IMPOSED.get(), drawer)
    if imposed is not None:
        return imposed
    if not torch.compiler.is_compiling():
        task = torch._C._current_graph_task_id()
        if task != -1:
            return drawer.records.of(task)
    override = _last(_OVERRIDES.get(), drawer)
    return drawer.default if override is None else override


@contextmanager
def imposed(drawer: Drawer, active: Active) -> Iterator[None]:
    """Within: exactly these sets, replay or not."""
    token = _IMPOSED.set((*_IMPOSED.get(), (id(drawer), active)))
    try:
        yield
    finally:
        _IMPOSED.reset(token)


def _last(entries: tuple[tuple[int, Active], ...], drawer: Drawer) -> Active | None:
    for key, active in reversed(entries):
        if key == id(drawer):
            return active
    return None


@dataclass
class _Backward:
    """What one running backward has met."""

    here: dict[int, Active] = field(default_factory=dict)  # by executing thread: the last stamp
    forwards: set[tuple[object, Active]] = field(default_factory=set)  # (thread, sets) of forwards

    @property
    def mixed(self) -> bool:
        """Forwards of several threads under different sets: autograd may interleave them."""
        threads = {thread for thread, _ in self.forwards}
        return len(threads) > 1 and len({active for _, active in self.forwards}) > 1


class Records:
    """By running backward (autograd's graph task): the sets of the forward behind it."""

    def __init__(self) -> None:
        self._of: dict[int, _Backward] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Records:
        return Records()

    def __reduce__(self) -> tuple[type[Records], tuple[()]]:
        return Records, ()

    def of(self, task: int) -> Active:
        """The record of a running backward; refused when it cannot be told."""
        record = self._of.get(task, _Backward())
        mine = record.here.get(threading.get_ident())
        found = set(record.here.values()) if mine is None else {mine}
        if len(found) == 1 and not record.mixed:
            return found.pop()
        raise ReplayError(
            "a forward is recomputed in backward and its adapter sets cannot be told"
            f" ({len(record.forwards)} records): call the backbone itself, not parts of it, and"
            " run one backward per forward thread"
        )

    def note(self, drawer: Drawer, active: Active, forward_thread: object) -> None:
        """Remember for this backward; autograd drops it when the backward ends."""
        task = torch._C._current_graph_task_id()
        if task not in self._of:
            while len(self._of) >= _MOST_RECORDS:
                self._of.pop(next(iter(self._of)), None)
            self._of[task] = _Backward()
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self.drop(task))
        record = self._of[task]
        record.here[threading.get_ident()] = active
        if (forward_thread, active) not in record.forwards:
            record.forwards.add((forward_thread, active))
            # `switch` may have put them to rest since: autograd drops what arrives at such leaves.
            drawer.require_grads(active)

    def drop(self, task: int) -> None:
        """Forget an ended backward."""
        self._of.pop(task, None)


class Stamp:
    """Forward hook of every module on the way to a slot: marks what its outputs came from."""

    def __init__(self, drawer: Drawer) -> None:
        self.drawer = drawer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        for t in _tensors(output):
            if t.grad_fn is not None:
                self._mark(t.grad_fn)

    def _mark(self, node: Node) -> None:
        key, notes = ("polyadapt", id(self.drawer)), _notes(node)
        if key in notes:  # a skipped block returns what another forward made: that one's
            return
        drawer, active, thread = self.drawer, current(self.drawer).held(), _this_thread()
        notes[key] = active
        node.register_prehook(lambda grads: drawer.records.note(drawer, active, thread))


def _notes(node: Node) -> dict[Any, Any]:
    """What Python keeps with an autograd node (a property that torch declares as a method)."""
    notes: dict[Any, Any] = node.metadata  # type: ignore[assignment]
    return notes


def _this_thread() -> object:
    """What stands for this thread: its number may be used again once it has ended."""
    token: object = _threads.__dict__.setdefault("token", object())
    return token


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
