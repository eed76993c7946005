"""One batch, several sets: run a weight's reader once per set and pick each sample's own row."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .activation import Active, current, imposed
from .errors import AdaptError

if TYPE_CHECKING:
    from .slots import Slot

_CACHES = ("kv_cache", "past_key_value", "past_key_values", "layer_past", "cache")


def groups(per_sample: Sequence[str | None], known: Container[str]) -> dict[str, list[int]]:
    """Sample numbers by set, for the sets that a slot has; samples without one are left out.

    >>> groups(["a", None, "b", "a"], ["a", "b"])
    {'a': [0, 3], 'b': [2]}
    """
    found: dict[str, list[int]] = {}
    for sample, name in enumerate(per_sample):
        if name is not None and name in known:
            found.setdefault(name, []).append(sample)
    return found


def check_batch(size: int, per_sample: Sequence[str | None] | Tensor, where: str) -> None:
    """The batch has one sample per name."""
    if size != len(per_sample):
        raise AdaptError(
            f"{where}: {len(per_sample)} names were given for a batch of {size}:"
            " one name (or None) per sample"
        )


def run_by_set(
    module: nn.Module,
    slots: Sequence[Slot],
    call: Callable[[], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a reader; in a mixed batch once per set over the whole batch (same bits as alone)."""
    drawer, axis = slots[0].drawer, slots[0].batch_axis
    names = current(drawer).per_sample
    if names is None:
        return call()
    _refuse_state(module, kwargs)
    with imposed(drawer, Active()):
        result = call()
    for name, rows in groups(names, drawer.sets).items():
        with imposed(drawer, Active((name,))):
            other = call()
        result = _choose(result, other, rows, axis, names, type(module).__name__)
    return result


def _refuse_state(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """A reader that keeps something between calls must not be run more than once."""
    from .activation import Stamp
    from .slots import OutputSlot

    kept = [key for key in _CACHES if kwargs.get(key) is not None]
    hooks = [h for m in module.modules() for h in m._forward_hooks.values()]
    foreign = [h for h in hooks if not isinstance(h, Stamp | OutputSlot)]
    if kept or foreign:
        raise AdaptError(
            f"{type(module).__name__} keeps state between calls ({kept or 'forward hooks'}), so one"
            " name per sample cannot act on its weights: use sites whose layers are called"
        )


def _choose(
    result: Any, other: Any, rows: list[int], axis: int, names: Sequence[str | None], where: str
) -> Any:
    if isinstance(result, Tensor):
        check_batch(result.shape[axis] if result.ndim > axis else 1, names, where)
        index = torch.tensor(rows, device=result.device)
        return result.index_copy(axis, index, other.index_select(axis, index))
    if isinstance(result, tuple):
        pairs = zip(result, other, strict=True)
        # attention weights (second output) put samples first even where tokens come first
        chosen = [
            _choose(a, b, rows, axis if n == 0 else 0, names, where)
            for n, (a, b) in enumerate(pairs)
        ]
        return tuple(chosen)
    if result is None:
        return None
    raise AdaptError(f"{where} returns {type(result).__name__}: one name per sample needs tensors")
