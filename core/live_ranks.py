"""Which ranks of a set with coefficients are alive, where they lie, and a plain LoRA of them alone.

For every method whose update is s B diag(p) A with p of its own: AdaLoRA, S2-LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .adapters.lora import LoRA, fits
from .errors import AdaptError
from .recipe import Adapter, LowRank, require, require_finite
from .recomputation import blocks
from .sets import AdapterSet
from .sites import Site, Sites

Converted = tuple[LoRA, Sites, dict[str, Tensor]]


def alive(p: Tensor, tau: float = 0.0, eps: float = 0.0) -> Tensor:
    """bool [r]: |p_k| above `tau` max_j |p_j| and above `eps`.

    >>> import torch
    >>> alive(torch.tensor([0.0, -2.0, 0.1, 1.0]), tau=0.1).tolist()
    [False, True, False, True]
    """
    require_finite("alive", tau=tau, eps=eps)
    require(0 <= tau < 1, f"tau={tau} is not allowed: a share of the largest, 0 to below 1")
    require(eps >= 0, f"eps={eps} is not allowed: a number from 0")
    size = p.detach().abs()
    return (size > tau * size.max()) & (size > eps)


def factors_of(adapters: AdapterSet) -> dict[Site, tuple[Tensor, Tensor, Tensor, float]]:
    """Site -> (A, B, p, s) without grad; methods without coefficients are refused."""
    return {site: _factors(adapters, adapter) for site, adapter in adapters.pairs()}


def _factors(adapters: AdapterSet, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor, float]:
    if isinstance(adapter, LowRank):
        a, b, p, scale = adapter.factors()
        if p is not None:
            return a.detach(), b.detach(), p.detach(), scale
    raise AdaptError(
        f"set {adapters.name!r} ({type(adapters.recipe).__name__}) has no coefficient per rank;"
        " AdaLoRA's and S2LoRA's sets do"
    )


def ranks(adapters: AdapterSet, tau: float = 0.0, eps: float = 0.0) -> dict[str, int]:
    """Site name -> live ranks."""
    found = factors_of(adapters).items()
    return {site.name: int(alive(p, tau, eps).sum()) for site, (_, _, p, _) in found}


@dataclass(frozen=True)
class RankTable:
    """Live ranks by layer (a block of the backbone, "" outside of them) and kind of weight."""

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    live: Mapping[tuple[str, str], int]  # (layer, kind) -> rank; not there: no site
    most: int  # ranks that a site has room for

    def __str__(self) -> str:
        rows = [["", *self.layers]]
        rows += [[k, *(str(self.live.get((at, k), "")) for at in self.layers)] for k in self.kinds]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def rank_table(adapters: AdapterSet, tau: float = 0.0, eps: float = 0.0) -> RankTable:
    """Where the live ranks lie; `rank_picture` draws it.

    >>> from torch import nn
    >>> from .adapters.s2lora import S2LoRA
    >>> from .sets import attach
    >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)))
    >>> made = attach(model, S2LoRA(rank=3, init="lora"), at="*.{0,1}")
    >>> print(rank_table(made))
       0  1
    0  3  3
    1  3  3
    """
    found = ranks(adapters, tau, eps)
    inside = [path for path, _ in blocks(adapters.backbone)]
    places = {site.name: _place(site, inside) for site in adapters.sites}
    return RankTable(
        layers=tuple(dict.fromkeys(layer for layer, _ in places.values())),
        kinds=tuple(dict.fromkeys(kind for _, kind in places.values())),
        live={places[name]: rank for name, rank in found.items()},
        most=max((len(p) for _, _, p, _ in factors_of(adapters).values()), default=0),
    )


def _place(site: Site, inside: list[str]) -> tuple[str, str]:
    """(layer, kind) of a site: the block that it lies in, and its name there."""
    for path in inside:
        if site.path.startswith(f"{path}."):
            return path, site.name.removeprefix(f"{path}.")
    return "", site.name


def as_lora(adapters: AdapterSet, tau: float = 0.0, eps: float = 0.0) -> Converted:
    """The live ranks as a plain LoRA: recipe, sites and tensors, s and p folded into B.

    Sites without a live rank are left out. The products are the same but for rounding, and for what
    `tau` and `eps` cut (see `alive`). Where the name of one site is the tail of another's, all have
    the largest rank: zeros fill the rest. `store.save_form` writes the result as a file.
    Raises `AdaptError` for a method without coefficients, and when nothing is alive.

    >>> import torch
    >>> from torch import nn
    >>> from .adapters.adalora import AdaLoRA
    >>> from .sets import attach
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> made = attach(model, AdaLoRA(rank=2), at="0")
    >>> with torch.no_grad():
    ...     _ = made.adapters["0"].E.copy_(torch.tensor([0.0, 2.0, 3.0]))
    >>> recipe, sites, tensors = as_lora(made)
    >>> plain = attach(model, recipe, sites, name="plain")
    >>> plain.load_state_dict(tensors)
    >>> plain.trainable_count()
    32
    """
    found = {site: (*own, alive(own[2], tau, eps)) for site, own in factors_of(adapters).items()}
    live = {site: own for site, own in found.items() if bool(own[-1].any())}
    require(bool(live), f"set {adapters.name!r} has no live rank: there is nothing to convert")
    recipe = _lora_of({site: int(mask.sum()) for site, (*_, mask) in live.items()})
    tensors: dict[str, Tensor] = {}
    for site, (a, b, p, scale, mask) in live.items():
        rank = recipe.rank_at(site)
        factor, missing = scale / recipe.scale_of(rank), rank - int(mask.sum())
        tensors[f"{site.name}/A"] = F.pad(a[mask], (0, 0, 0, missing))
        tensors[f"{site.name}/B"] = F.pad(b[:, mask] * (factor * p[mask]), (0, missing))
    return recipe, Sites(live), tensors


def _lora_of(wanted: Mapping[Site, int]) -> LoRA:
    """LoRA of these ranks; of the largest alone where names as patterns fit other sites, too."""
    largest = max(wanted.values())
    recipe = LoRA(
        rank=largest, ranks={s.name: r for s, r in wanted.items() if r != largest}, alpha=1.0
    )
    clash = any(
        fits(name, site) and rank != wanted[site]
        for name, rank in recipe.ranks.items()
        for site in wanted
    )
    return recipe.replace(ranks={}) if clash else recipe
