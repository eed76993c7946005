"""Combine the sets of one backbone into a new one: exact sums, TIES, DARE."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from .adapters.lora import LoRA, LoRAAdapter, Pair
from .combine_rule import Method, Rule, is_number
from .drawer import check_set_name, same_device
from .errors import AdaptError
from .low_rank import Lost, Update, folded, overall
from .recipe import Adapter, LowRank, require, require_rank
from .sets import AdapterSet, install, sets_of
from .sites import Site, Sites, refuse_repeated

Weights = Mapping[str, float] | Sequence[tuple["str | AdapterSet", float]]
Weighted = Sequence[tuple[AdapterSet, float]]


def combine(
    backbone: nn.Module,
    weights: Weights,
    name: str = "combined",
    *,
    method: Method = "exact",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> AdapterSet:
    """Attach the weighted sum of low-rank sets as a LoRA set, and make it the default.

    At each site delta = sum_i w_i s_i B_i A_i; a set without that site adds nothing.
    `exact`: the concatenated factors, of the sum of the ranks. One set alone at weight 1 (sets at
    weight 0 count for nothing) is copied bit for bit, whatever its method.
    `svd`: the best update of `rank` at most to that sum; the weight's own size is never built.
    `ties` (arXiv 2306.01708): w_i delta_i trimmed to the `density` largest entries, signs elected,
    those that agree averaged; per site, where the paper trims over a whole model at once.
    `dare` (2311.03099): each delta_i loses all but a random `density` of its entries, the rest are
    divided by it, then summed; `seed`, the site and the set's place in the order decide the draw.
    Both work on the dense update of one site at a time and keep the best `rank` of the result.
    `extra["combined"]` states the relative error (Frobenius norm) of the cut to `rank`, in total
    and per site. `extra` and `head` keep what all sets agree on. Nothing is changed when refused.

    >>> from polyadapt.core import LoRA, attach
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> pets, cars = (attach(model, LoRA(rank=2), at="0", name=n) for n in ("pets", "cars"))
    >>> combine(model, {"pets": 0.7, "cars": 0.3}, name="both").recipe.rank
    4
    """
    check_set_name(name, sets_of(backbone))
    rule = Rule(method, rank, density, seed)
    made = combined(_attached(backbone, weights), name, rule).to(same_device(backbone))
    install(backbone, made.train(backbone.training))
    return made


@torch.no_grad()
def combined(weighted: Weighted, name: str, rule: Rule) -> AdapterSet:
    """The set that `combine` attaches, made from sets alone."""
    used = [(s, float(w)) for s, w in weighted if w != 0]
    if rule.copies([w for _, w in used]):
        return _twin(used[0][0], name)
    updates = _updates(used)
    rule.check(updates)
    results = {site: _result(rule, site, found) for site, found in updates.items()}
    made = _lora(name, {site: update for site, (update, _) in results.items()})
    made.head, made.extra = _agreed(used)
    made.extra["combined"] = {
        **asdict(rule),
        "weights": [[s.name, w] for s, w in used],
        "error": overall(lost for _, lost in results.values()).share,
        "errors": {site.name: lost.share for site, (_, lost) in results.items()},
    }
    return made


def _result(rule: Rule, site: Site, updates: Sequence[Update | None]) -> tuple[Update, Lost]:
    finite = all(u.finite() for u in updates if u is not None)
    try:
        update, lost = rule.at(site, updates) if finite else (None, Lost())
    except LinAlgError:  # what LAPACK says of infinity, here a product too large
        update = None
    if update is None or not update.finite():
        raise AdaptError(
            f"combine: the update at {site.name} is not finite: a set holds NaN or infinity, or"
            " its numbers are too large with this weight"
        )
    return update, lost


def _attached(backbone: nn.Module, weights: Weights) -> Weighted:
    pairs = list(weights.items()) if isinstance(weights, Mapping) else weights
    plain = isinstance(pairs, list | tuple) and all(isinstance(p, tuple | list) for p in pairs)
    if not plain or any(len(pair) != 2 for pair in pairs):
        raise AdaptError(f"combine takes sets and weights, {{'pets': 0.7}}, not {weights!r}")
    found = [(_set(backbone, asked), weight) for asked, weight in pairs]
    check_weights([(one.name, weight) for one, weight in found])
    return found


def _set(backbone: nn.Module, asked: object) -> AdapterSet:
    known = sets_of(backbone)
    one = known.get(asked) if isinstance(asked, str) else asked
    if not isinstance(one, AdapterSet):
        raise AdaptError(f"no adapter set is called {asked!r}; attached: {sorted(known)}")
    if one.backbone is not backbone:
        raise AdaptError(
            f"set {one.name!r} is on another backbone: save it and load it on this one"
        )
    return one


def check_weights(weights: Sequence[tuple[str, float]]) -> None:
    """At least one set, none twice, every weight a finite number."""
    require(bool(weights), "combine needs sets with their weights, such as {'pets': 0.7}")
    for place, (name, weight) in enumerate(weights):
        require(is_number(weight), f"combine: {name!r} has weight {weight!r}: a finite number")
        earlier = [other for other, _ in weights[:place]]
        require(name not in earlier, f"combine: set {name!r} is named twice: add its weights")


def _updates(used: Weighted) -> dict[Site, list[Update | None]]:
    """Site -> the weighted update of each set there, None where a set has no such site."""
    sites: dict[str, Site] = {}
    for adapters, _ in used:
        require(bool(adapters.sites), f"set {adapters.name!r} has no sites: nothing to combine")
        for site in adapters.sites:
            sites.setdefault(site.name, site)
    refuse_repeated(list(sites.values()))
    held = [(adapters, adapters.adapters, weight) for adapters, weight in used]
    return {
        site: [_update(s, own[name], weight) if name in own else None for s, own, weight in held]
        for name, site in sites.items()
    }


def _update(adapters: AdapterSet, adapter: Adapter, weight: float) -> Update:
    if not isinstance(adapter, LowRank):
        raise AdaptError(
            f"set {adapters.name!r} ({type(adapters.recipe).__name__}) has no low-rank update, so"
            " it combines alone at weight 1 only; to add others to it as they are, act with both:"
            f" activate(backbone, [{adapters.name!r}, ...])"
        )
    return folded(adapter.factors(), weight)


def _twin(adapters: AdapterSet, name: str) -> AdapterSet:
    """The same recipe, sites, bits, head and extras under another name."""
    modules, bank = copy.deepcopy((list(adapters.adapters.values()), adapters.bank))
    twin = AdapterSet(name, adapters.recipe, adapters.sites, modules, bank)
    twin.head = {key: tensor.clone() for key, tensor in adapters.head.items()}
    twin.extra = copy.deepcopy(adapters.extra)
    return twin


def _lora(name: str, updates: Mapping[Site, Update]) -> AdapterSet:
    """A LoRA set that does exactly these updates."""
    recipe = _recipe({site: update.rank for site, update in updates.items()})
    adapters = []
    for site, update in updates.items():
        rank = recipe.rank_at(site)
        require_rank("combine", rank, site)
        scale = recipe.scale_of(rank)
        a, b = _padded(update.A, rank, 0), _padded(update.B / scale, rank, 1)
        adapters.append(LoRAAdapter(Pair(a, b, scale, 0.0, site.kind == "embedding")))
    return AdapterSet(name, recipe, Sites(updates), adapters)


def _recipe(ranks: Mapping[Site, int]) -> LoRA:
    """LoRA of these ranks; of one rank where names of sites cannot tell them apart as patterns."""
    top = max(ranks.values())
    others = {site.name: rank for site, rank in ranks.items() if rank != top}
    try:
        recipe = LoRA(rank=top, ranks=others)
        if all(recipe.rank_at(site) == rank for site, rank in ranks.items()):
            return recipe
    except AdaptError:  # a name with other signs than a pattern may have, or the tail of another
        pass
    return LoRA(rank=top)


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    """The factor with zeros up to the rank."""
    missing = rank - factor.shape[dim]
    if not missing:
        return factor
    shape = [missing if n == dim else size for n, size in enumerate(factor.shape)]
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _agreed(used: Weighted) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(head, extra): what all sets hold alike; a sum of heads would be nobody's."""
    (first, _), *others = used
    heads = [other.head for other, _ in others]
    same = all(
        head.keys() == first.head.keys()
        and all(torch.equal(t, head[key]) for key, t in first.head.items())
        for head in heads
    )
    extra = {
        key: copy.deepcopy(value)
        for key, value in first.extra.items()
        if all(key in other.extra and other.extra[key] == value for other, _ in others)
    }
    return {key: t.clone() for key, t in first.head.items()} if same else {}, extra
