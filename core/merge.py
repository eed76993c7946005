"""Merge a set into new parameters of its backbone, and give the old ones back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .activation import Active
from .drawer import drawer_of
from .errors import AdaptError
from .kinds import layer_at
from .layers import FrozenLayer
from .recipe import ActsOnWeight, Adapter, Piece
from .slots import apply_weights

if TYPE_CHECKING:
    from .sets import AdapterSet


def merge(adapter_set: AdapterSet) -> None:
    """W0 -> W' in new parameters; the old are kept. Methods without a weight form are refused."""
    drawer = drawer_of(adapter_set.backbone)
    if drawer.open:
        raise AdaptError(
            f"set {adapter_set.name!r} cannot be merged while a context (`activate`, `route`)"
            " promises other weights, in whatever thread: leave the context first"
        )
    if not adapter_set.sites:
        method = type(adapter_set.recipe).__name__
        raise AdaptError(f"{method} has no sites: there is nothing to merge")
    for site, adapter in adapter_set.adapters.items():
        if not isinstance(adapter, ActsOnWeight):
            method = type(adapter_set.recipe).__name__
            raise AdaptError(
                f"{method} acts on activations at {site}: it cannot be merged into weights"
            )
    if drawer.merged is not None:
        raise AdaptError(f"set {drawer.merged!r} is merged already: unmerge it first")
    pieces = _pieces(adapter_set)
    new = {key: _merged(here) for key, here in pieces.items()}
    _warn_of_lost_bits([(layer, new[key]) for key, here in pieces.items() for layer, _ in here])
    for (path, name), value in new.items():
        module = adapter_set.backbone.get_submodule(path)
        old = module._parameters[name]
        assert old is not None, "a site's parameter exists"
        drawer.kept[path, name] = (adapter_set.name, old)
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    drawer.before_merge, drawer.default = drawer.default, Active((adapter_set.name,))


def unmerge(adapter_set: AdapterSet) -> None:
    """Put the very parameters back that `merge` took out."""
    drawer = drawer_of(adapter_set.backbone)
    if adapter_set.name != drawer.merged:
        raise AdaptError(f"set {adapter_set.name!r} is not merged")
    for (path, name), (_, old) in drawer.kept.items():
        module = adapter_set.backbone.get_submodule(path)
        new = module._parameters[name]
        assert new is not None, "merge put it there"
        old.data = old.data.to(new.device, new.dtype)  # if the backbone was moved or cast meanwhile
        module._parameters[name] = old
    drawer.kept.clear()
    still_here = (n for n in drawer.before_merge.names if n in drawer.sets)
    drawer.default = Active(tuple(still_here))


def _pieces(adapter_set: AdapterSet) -> dict[tuple[str, str], list[Piece]]:
    """The set's adapters by the parameter that they change."""
    pieces: dict[tuple[str, str], list[Piece]] = {}
    for site, adapter in zip(adapter_set.sites, adapter_set.modules_in_order, strict=True):
        assert isinstance(adapter, Adapter), "a set holds adapters"
        layer = layer_at(adapter_set.backbone, site)
        pieces.setdefault((site.path, site.parameter or ""), []).append((layer, adapter))
    return pieces


@torch.no_grad()
def _merged(pieces: list[Piece]) -> Tensor:
    merged = apply_weights(pieces[0][0].stored, pieces)
    return merged.clone(memory_format=torch.contiguous_format)  # full tuning returns its own tensor


def _warn_of_lost_bits(new: Sequence[tuple[FrozenLayer, Tensor]]) -> None:
    """Low precision cannot hold small updates: say how many adapted entries did not move."""
    still = total = 0
    for layer, value in new:
        if value.dtype in (torch.bfloat16, torch.float16):
            still += int((layer.matrix() == layer.matrix(value)).sum())
            total += layer.matrix().numel()
    if total and still > total / 10:
        share = 100 * still / total
        warnings.warn(
            f"merging in low precision left {share:.0f} % of the entries unchanged: the update is"
            " smaller than their spacing; merge into fp32 weights, or serve unmerged",
            stacklevel=4,
        )
