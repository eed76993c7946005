"""How an adapter reaches its layer. Users never see a slot.

WeightSlot: whoever reads `layer.weight` gets W'. OutputSlot: a forward hook that changes what the
layer returns. Both hold the adapters of all sets at one parameter or module and ask which act.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .activation import Active, current
from .drawer import Drawer
from .errors import AdaptError
from .ffn_input import FFNInput
from .gathered import Choice, Kept, Samples, apply, choose, keep, routed
from .inject import frame
from .layers import FrozenLayer, Rows, replace_rows
from .mixing import check_batch, groups
from .recipe import ActsOnInput, ActsOnOutput, ActsOnWeight, Piece


class Slot:
    """The adapters of all sets at one place: set name -> [(layer rows, adapter), ...]."""

    def __init__(self, drawer: Drawer, path: str, batch_axis: int) -> None:
        self.drawer = drawer
        self.path = path
        self.batch_axis = batch_axis
        self.adapters: dict[str, list[Piece]] = {}

    def acting(self, active: Active) -> list[str]:
        """The names that act here, in order."""
        known = self.known()
        return [name for name in active.names if name in known]

    def known(self) -> Container[str]:
        """The sets with an adapter here; none while a set, then the only one, is merged."""
        return () if self.drawer.kept else self.adapters


class WeightSlot(Slot):
    """What reads of one parameter return."""

    readers: Sequence[nn.Module] = ()  # modules whose call reads the weight

    def __init__(self, drawer: Drawer, path: str, batch_axis: int, layer: FrozenLayer) -> None:
        super().__init__(drawer, path, batch_axis)
        self.layer = layer

    def read(self) -> Tensor:
        """W' of the sets that act, the stored parameter itself when none does."""
        active = current(self.drawer)
        if active.per_sample is not None:
            if not groups(active.per_sample, self.known()):
                return self.layer.stored
            raise AdaptError(
                f"{self.path}.{self.layer.parameter}".lstrip(".") + " is read outside the call of"
                " the layer that owns it, where one name per sample cannot act"
            )
        names = tuple(self.acting(active))
        if not names:
            return self.layer.stored
        memo = frame()
        if memo is None:
            return self.adapted(names)
        key = (id(self), names, *_modes())
        if key not in memo:
            memo[key] = self.adapted(names)
        return memo[key]

    def adapted(self, names: Sequence[str]) -> Tensor:
        """The stored parameter with these sets applied one after another."""
        weight: Tensor = self.layer.stored
        for name in names:
            weight = apply_weights(weight, self.adapters[name])
        return weight


def apply_weights(stored: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """A parameter in its stored layout -> the same with each adapter's rows replaced by W'."""
    first = pieces[0][0]
    parts: list[tuple[Rows, Tensor]] = []
    for layer, adapter in pieces:
        # A cast: attach has made sure, and asking a protocol at every call is slow.
        new = cast(ActsOnWeight, adapter).weight(layer.matrix(stored))
        if layer.rows is None:
            return layer.as_stored(new, stored)
        parts.append((layer.rows, new))
    return first.as_stored(replace_rows(first.as_matrix(stored), parts), stored)


def _modes() -> tuple[Any, ...]:
    """A value made without grad, or under another autocast, is not the same value."""
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    dtypes = torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda")
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, *dtypes


class OutputSlot(Slot):
    """Forward hook of one module: its output, with the acting adapters applied."""

    handle: RemovableHandle
    ffn: FFNInput | None = None  # set when an adapter wants the state that enters the MLP branch
    entry: RemovableHandle | None = (
        None  # set when an adapter changes what the module is called with
    )

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: the acting adapters' say in what the module is called with.

        Such a module is framed like a weight's reader: in a mixed batch it is called once per set.
        """
        acting = self.acting(current(self.drawer))
        adapters = [adapter for name in acting for _, adapter in self.adapters[name]]
        entering = [adapter for adapter in adapters if isinstance(adapter, ActsOnInput)]
        if not entering:
            return None
        x = self._tensor(args, kwargs)
        new = x
        for adapter in entering:
            new = adapter.enter(new)
        # By identity: the very tensor may be given once, as the first of either.
        return (
            tuple(new if value is x else value for value in args),
            {key: new if value is x else value for key, value in kwargs.items()},
        )

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        active = current(self.drawer)
        ffn = None if self.ffn is None else self.ffn.take()
        if active.routed is not None:
            return self._routed(active, args, kwargs, output)
        if active.per_sample is not None:
            return self._mixed(active, args, kwargs, output, ffn)
        names = self.acting(active)
        if not names:
            return None  # torch keeps the very tensor
        x, y = self._tensor(args, kwargs), _first_tensor(output, self.path)
        for name in names:
            y = self._apply(name, x, ffn, y)
        return _with_first_tensor(output, y)

    def _routed(
        self, active: Active, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """A stack's factors, chosen by a tensor."""
        assert active.routed is not None, "asked before"
        parts, index = active.routed.parts.get(self.path), active.routed.index
        if parts is None:
            return None
        x, y = self._tensor(args, kwargs), _first_tensor(output, self.path)
        check_batch(y.shape[self.batch_axis], index, self.path)
        chosen = routed(parts, index, active.kept, self)
        return _with_first_tensor(output, apply(chosen, x, y, self.batch_axis))

    def _mixed(
        self,
        active: Active,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        ffn: Tensor | None,
    ) -> Any:
        """One set per sample."""
        samples, chosen = self._choice(active)
        if not samples:
            return None
        x, y = self._tensor(args, kwargs), _first_tensor(output, self.path)
        check_batch(y.shape[self.batch_axis], active.per_sample or (), self.path)
        if chosen is not None and x.dtype == y.dtype:
            y = apply(chosen, x, y, self.batch_axis)
        else:
            y = self._by_set(samples, x, ffn, y)
        return _with_first_tensor(output, y)

    def _choice(self, active: Active) -> tuple[Samples, list[Choice] | None]:
        """Who needs which set here, and their factors: gathered once while grad is off."""
        once = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        kept: Kept | None = active.kept.get(self) if once else None
        if kept is not None and kept.fresh():
            return kept.samples, kept.chosen
        names = active.per_sample or ()
        samples = groups(names, self.known())
        chosen = choose(self.adapters, samples, len(names))
        if once:
            pieces = [piece for name in samples for piece in self.adapters[name]]
            active.kept[self] = keep(samples, chosen, pieces)
        return samples, chosen

    def _by_set(self, samples: Samples, x: Tensor, ffn: Tensor | None, y: Tensor) -> Tensor:
        axis = self.batch_axis
        for name, rows in samples.items():
            index = torch.tensor(rows, device=y.device)
            own_ffn = None if ffn is None else ffn.index_select(axis, index)
            own = self._apply(
                name, x.index_select(axis, index), own_ffn, y.index_select(axis, index)
            )
            y = y.index_copy(axis, index, own)
        return y

    def _apply(self, name: str, x: Tensor, ffn: Tensor | None, y: Tensor) -> Tensor:
        parts: list[tuple[Rows, Tensor]] = []
        axis = self.adapters[name][0][0].channel_axis
        for layer, adapter in self.adapters[name]:
            given = x if adapter.input == "layer" else self._state(ffn)
            output = cast(ActsOnOutput, adapter).output  # as attach has made sure
            if layer.rows is None:
                return output(given, y, layer)
            start, stop = layer.rows
            part = y.narrow(axis, start, stop - start)
            parts.append((layer.rows, output(given, part, layer)))
        return replace_rows(y, parts, axis)

    def _state(self, ffn: Tensor | None) -> Tensor:
        if ffn is None:
            raise AdaptError(
                f"{self.path}: its MLP branch was not called, so it has no input to adapt"
            )
        return ffn

    def _tensor(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                return value
        raise AdaptError(f"{self.path} was called without a tensor")


def _first_tensor(output: Any, path: str) -> Tensor:
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise AdaptError(f"{path} returns {type(output).__name__}: its first item must be a tensor")
    return first


def _with_first_tensor(output: Any, y: Tensor) -> Any:
    if isinstance(output, tuple | list):
        changed = (y, *output[1:])
        return output._make(changed) if hasattr(output, "_make") else type(output)(changed)
    return y
