"""Put a set's adapters into slots, and take them out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from .drawer import Drawer
from .ffn_input import FFNInput
from .inject import adapt_parameter, frame_calls, restore_parameter, unframe_calls
from .kinds import layer_at
from .layers import module_at
from .readers import batch_axis_of
from .recipe import ActsOnInput, ActsOnOutput, Adapter, offers
from .sites import Site
from .slots import OutputSlot, WeightSlot

if TYPE_CHECKING:
    from .sets import AdapterSet


def wire(drawer: Drawer, made: AdapterSet) -> None:
    """Make the slots that the set needs, or use those that are there; all or nothing."""
    backbone: nn.Module = drawer.__dict__["backbone"]
    batch_axes: dict[str, int] = {}
    try:
        for site, adapter in zip(made.sites, made.modules_in_order, strict=True):
            assert isinstance(adapter, Adapter), "a set holds adapters"
            slot = _slot(drawer, site, adapter, batch_axes)
            layer = layer_at(backbone, site)
            slot.adapters.setdefault(made.name, []).append((layer, adapter))
            drawer.stamp(site.path)
    except BaseException:
        unwire(drawer, made)
        raise


def unwire(drawer: Drawer, made: AdapterSet) -> None:
    """Take a set out of its slots; empty slots go."""
    for key, slot in list(drawer.slots.items()):
        slot.adapters.pop(made.name, None)
        if not slot.adapters:
            _remove(drawer, slot)
            del drawer.slots[key]


def _slot(
    drawer: Drawer, site: Site, adapter: Adapter, batch_axes: dict[str, int]
) -> WeightSlot | OutputSlot:
    by_output = site.slot == "output" and offers(adapter, ActsOnOutput)
    key = (site.path, None if by_output else site.parameter)
    if key not in drawer.slots:
        make = _output_slot if by_output else _weight_slot
        axis = batch_axis_of(drawer.__dict__["backbone"], site.path, batch_axes)
        drawer.slots[key] = make(drawer, site, axis)
    slot = drawer.slots[key]
    if isinstance(slot, OutputSlot) and adapter.input == "ffn" and slot.ffn is None:
        slot.ffn = FFNInput(drawer.__dict__["backbone"].get_submodule(site.path), site.path)
    if isinstance(slot, OutputSlot) and offers(adapter, ActsOnInput) and slot.entry is None:
        module = drawer.__dict__["backbone"].get_submodule(site.path)
        slot.entry = module.register_forward_pre_hook(slot.enter, with_kwargs=True)
        frame_calls(module, slot)
    return slot


def _output_slot(drawer: Drawer, site: Site, batch_axis: int) -> OutputSlot:
    slot = OutputSlot(drawer, site.path, batch_axis)
    module = module_at(drawer.__dict__["backbone"], site.path)
    # Prepended: whisper's key-value cache hooks must see the adapted output, whenever installed.
    slot.handle = module.register_forward_hook(slot, prepend=True, with_kwargs=True)
    return slot


def _weight_slot(drawer: Drawer, site: Site, batch_axis: int) -> WeightSlot:
    backbone: nn.Module = drawer.__dict__["backbone"]
    whole = Site(site.path, site.parameter, None, None, site.kind, site.shape, "weight", site.why)
    slot = WeightSlot(drawer, site.path, batch_axis, layer_at(backbone, whole))
    module = module_at(backbone, site.path)
    slot.readers = [backbone.get_submodule(path) for path in site.readers or (site.path,)]
    adapt_parameter(module, site.parameter or "", slot)
    for reader in slot.readers:
        frame_calls(reader, slot)
    return slot


def _remove(drawer: Drawer, slot: WeightSlot | OutputSlot) -> None:
    if isinstance(slot, OutputSlot):
        slot.handle.remove()
        if slot.ffn is not None:
            slot.ffn.remove()
        if slot.entry is not None:
            slot.entry.remove()
            unframe_calls(drawer.__dict__["backbone"].get_submodule(slot.path), slot)
        return
    for reader in slot.readers:
        unframe_calls(reader, slot)
    restore_parameter(slot.layer.module, slot.layer.parameter or "")
