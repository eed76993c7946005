"""Give one module a subclass of its own class: adapted parameters, and a frame around its call.

The subclass has a property for each adapted parameter, found before nn.Module's own lookup. The
parameter itself stays where it was (`module._parameters`), so state_dict, `.to()`, optimisers and
strict loading never notice; name, isinstance and repr of the layer stay too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import SiteError

if TYPE_CHECKING:
    from .slots import Slot, WeightSlot

SLOTS = "_polyadapt_weight_slots"
READS = "_polyadapt_read_slots"
_frames = threading.local()


def adapt_parameter(module: nn.Module, name: str, slot: WeightSlot) -> None:
    """From now on `module.<name>` is what the slot makes of the stored parameter."""
    slots = module.__dict__.setdefault(SLOTS, {})
    if name in slots:
        raise SiteError(
            f"{slot.path}.{name} is adapted already through a module above or below the one that"
            " is adapted now: attach every set to the same backbone"
        )
    slots[name] = slot
    _set_class(module)


def restore_parameter(module: nn.Module, name: str) -> None:
    """Undo `adapt_parameter`."""
    slots = module.__dict__[SLOTS]
    del slots[name]
    if not slots:
        del module.__dict__[SLOTS]
    _set_class(module)


def frame_calls(module: nn.Module, slot: Slot) -> None:
    """`module` reads the slot's weight: adapt it once per call, and run mixed batches by set."""
    module.__dict__.setdefault(READS, []).append(slot)
    _set_class(module)


def unframe_calls(module: nn.Module, slot: Slot) -> None:
    """Undo `frame_calls`."""
    reads = module.__dict__[READS]
    reads[:] = [other for other in reads if other is not slot]
    if not reads:
        del module.__dict__[READS]
    _set_class(module)


def frame() -> dict[Any, Tensor] | None:
    """The memo of the innermost running reader of this thread; none while compiling."""
    if torch.compiler.is_compiling():
        return None
    stack: list[dict[Any, Tensor]] = getattr(_frames, "stack", [])
    return stack[-1] if stack else None


def _set_class(module: nn.Module) -> None:
    cls = type(module)
    base = cls.__dict__.get("polyadapt_base", cls)
    names = tuple(sorted(module.__dict__.get(SLOTS, {})))
    framed = READS in module.__dict__
    module.__class__ = _adapted_class(base, names, framed) if names or framed else base


@cache
def _adapted_class(base: type[nn.Module], names: tuple[str, ...], framed: bool) -> type[nn.Module]:
    body: dict[str, Any] = {
        "polyadapt_base": base,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": _reduce,
        **{name: property(_reader(name)) for name in names},
    }
    if framed:
        body["__call__"] = _framed_call
    return type(base.__name__, (base,), body)


def _reader(name: str) -> Callable[[nn.Module], Tensor]:
    def read(module: nn.Module) -> Tensor:
        slot: WeightSlot = module.__dict__[SLOTS][name]
        return slot.read()

    return read


def _framed_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the reader inside a fresh memo; try/finally, since hooks do not survive an interrupt."""
    from .mixing import run_by_set

    def call() -> Any:
        return type(self).polyadapt_base.__call__(self, *args, **kwargs)  # type: ignore[attr-defined]

    slots: list[Slot] = self.__dict__[READS]
    if torch.compiler.is_compiling():  # no memo: the compiler merges equal work
        return run_by_set(self, slots, call, args, kwargs)
    stack = _frames.__dict__.setdefault("stack", [])
    stack.append({})
    try:
        return run_by_set(self, slots, call, args, kwargs)
    finally:
        stack.pop()


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle and deepcopy: the injected class is rebuilt from its base, not looked up by name."""
    cls = type(self)
    base = cls.polyadapt_base  # type: ignore[attr-defined]
    names = tuple(sorted(self.__dict__.get(SLOTS, {})))
    return _rebuild, (base, names, READS in self.__dict__), self.__getstate__()


def _rebuild(base: type[nn.Module], names: tuple[str, ...], framed: bool) -> nn.Module:
    cls: type[nn.Module] = _adapted_class(base, names, framed)  # type: ignore[arg-type]
    return cls.__new__(cls)
