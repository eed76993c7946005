"""A digest of the frozen weights that a set was trained on: the wrong backbone is refused by it.

Row and column sums of the raw bits in wrapping int64, then sha256. Integer sums do not depend on
their order, so every device gives the same digest, at a fifth of the cost of hashing all bytes. It
finds swaps, flips and casts; it protects against mistakes, not against an attacker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .sites import Site

_BLOCK = 512  # words per row: the sums of a row of 4 KiB fit a cache line or two


def digest(tensor: Tensor) -> str:
    """Hex digest of shape, dtype and every bit of a tensor.

    >>> digest(torch.zeros(2, 3)) == digest(torch.zeros(3, 2))
    False
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.data_ptr() % 8:  # a view that starts between two words
        flat = flat.clone()
    whole = flat.numel() // (8 * _BLOCK) * 8 * _BLOCK
    words = flat[:whole].view(torch.int64).view(-1, _BLOCK)
    sums = torch.cat([words.sum(0), words.sum(1)]).cpu()
    found = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    found.update(sums.numpy().tobytes())
    found.update(flat[whole:].cpu().numpy().tobytes())
    return found.hexdigest()


def fingerprint(backbone: nn.Module, sites: Iterable[Site]) -> dict[str, str]:
    """Parameter name -> digest of the frozen weights at these sites, each hashed once.

    A whole-module site stands for all parameters below it; no sites at all, for the whole backbone.
    """
    return {name: digest(p) for name, p in frozen_weights(backbone, sites).items()}


def frozen_weights(backbone: nn.Module, sites: Iterable[Site]) -> dict[str, Tensor]:
    """The frozen parameters that sites stand for, by name; the originals of merged ones."""
    from .drawer import DRAWER, find_drawer

    sites = list(sites)
    prefixes = [f"{s.path}." for s in sites if s.parameter is None] if sites else [""]
    wanted = {f"{s.path}.{s.parameter}".lstrip(".") for s in sites if s.parameter is not None}
    drawer = find_drawer(backbone)
    kept = (
        {f"{path}.{name}".lstrip("."): old for (path, name), (_, old) in drawer.kept.items()}
        if drawer
        else {}
    )
    return {
        name: kept.get(name, p)
        for name, p in backbone.named_parameters()
        if DRAWER not in name.split(".") and (name in wanted or name.startswith(tuple(prefixes)))
    }
