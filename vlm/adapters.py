"""Adapter sets on towers whose attention is split or not: a set of one loads on the other."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.adapters.lora import LoRA
from ..core.errors import SiteError
from ..core.fingerprint import digest, fingerprint, frozen_weights
from ..core.recipe import Recipe
from ..core.sets import AdapterSet
from ..core.sites import Site, Sites, select
from ..core.store import AdapterFile, load
from .split import PROJECTIONS, SplitAttention

CLIP_LORA = LoRA(rank=2, alpha=1, scaling="rank_stabilised", dropout=0.25)
"""The method of CLIP-LoRA (arXiv 2405.18541) as its code has it, on q, k and v of all layers.

The code scales by alpha / sqrt(r), the paper writes alpha / r (`scaling="standard"`)."""

_SPLIT = re.compile(r"(?P<at>.+)\.(?P<part>[qkv])_proj(?:\.(?P<leaf>bias))?")
_FUSED = re.compile(r"(?P<at>.+)\.in_proj_(?P<leaf>weight|bias)\[(?P<part>[qkv])\]")


def load_set(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    trainable: bool = False,
    strict: bool = True,
) -> AdapterSet:
    """Attach the set of a file, whether it was made on split towers or not; see core's `load`.

    `q_proj` of split attention is `in_proj_weight[q]` of the other, so a set that was trained with
    dropout, which needs called layers, merges into open_clip's plain weights. There it is loaded
    for inference, where dropout does nothing: with `trainable` such a set is refused.
    """

    def convert(file: AdapterFile) -> AdapterFile:
        return as_for(file, model, trainable=trainable)

    return load(model, path, name, trainable=trainable, strict=strict, convert=convert)


def as_for(file: AdapterFile, model: nn.Module, *, trainable: bool = False) -> AdapterFile:
    """What a file holds, in the names that this model has; unchanged if they are that already.

    A site that the model does not have keeps its name: `load` then says that it is not there.
    """
    modules = dict(model.named_modules())
    names = [_name_here(site.name, modules) for site in file.sites]
    try:
        found = select(model, names)
    except SiteError:
        return file
    if len(found) != len(names):  # a name that only the ends of several paths fit
        return file
    sites = Sites(map(_kept, file.sites, found))
    if sites == file.sites:
        return file
    new = {old.name: site.name for old, site in zip(file.sites, sites, strict=True)}

    def moved(key: str) -> str:
        site, _, rest = key.partition("/")
        return f"{new.get(site, site)}/{rest}"  # what no site owns is a bank's: it keeps its name

    recipe = file.recipe.renamed(dict(zip(file.sites, new.values(), strict=True)))
    return dataclasses.replace(
        file,
        sites=sites,
        recipe=recipe if trainable else _undropped(recipe, sites),
        tensors={moved(key): tensor for key, tensor in file.tensors.items()},
        fingerprint=_fingerprint_here(file.fingerprint, model, sites),
    )


def _name_here(name: str, modules: Mapping[str, nn.Module]) -> str:
    split, fused = _SPLIT.fullmatch(name), _FUSED.fullmatch(name)
    if split and getattr(modules.get(split["at"]), "in_proj_weight", None) is not None:
        return f"{split['at']}.in_proj_{split['leaf'] or 'weight'}[{split['part']}]"
    if fused and isinstance(modules.get(fused["at"]), SplitAttention):
        leaf = "" if fused["leaf"] == "weight" else ".bias"
        return f"{fused['at']}.{fused['part']}_proj{leaf}"
    return name


def _kept(old: Site, here: Site) -> Site:
    """The file's own site, unless it is called or reached otherwise in this model.

    An output projection has one name in both; only split attention calls it.
    """
    moved = old.name != here.name or (old.slot == "output" and here.slot == "weight")
    return here if moved else old


def _undropped(recipe: Recipe, sites: Sites) -> Recipe:
    """Without dropout where a weight is read: nothing there has an input to drop."""
    if all(site.slot == "output" for site in sites):
        return recipe
    rates = [f.name for f in dataclasses.fields(recipe) if f.name.endswith("dropout")]
    return recipe.replace(**dict.fromkeys(rates, 0.0))


def _fingerprint_here(saved: Mapping[str, str], model: nn.Module, sites: Sites) -> dict[str, str]:
    """The saved digests by this model's names.

    One matrix and its three parts have different digests. Those of the form that the file has are
    made of this model's weights: where they are the saved ones, this model's own stand for them.
    """
    found, own = dict(saved), fingerprint(model, sites)
    for name in own.keys() - saved.keys():
        other = _other_form(model, name)
        met = {there: saved[there] for there in other if there in saved}
        same = all(digest(other[there]) == value for there, value in met.items())
        if met:
            found[name] = own[name] if same else next(iter(met.values()))
        for there in met.keys() - own.keys():
            found.pop(there, None)
    return found


def _other_form(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The same frozen numbers by the names, and in the shape, that they have (not) split."""
    if fused := re.fullmatch(r"(.+)\.in_proj_(weight|bias)", name):
        at, leaf = fused.groups()
        rows = _frozen(model, [name])[0].chunk(3)
        return {f"{at}.{part}.{leaf}": row for part, row in zip(PROJECTIONS, rows, strict=True)}
    if split := re.fullmatch(r"(.+)\.[qkv]_proj\.(weight|bias)", name):
        at, leaf = split.groups()
        parts = _frozen(model, [f"{at}.{part}.{leaf}" for part in PROJECTIONS])
        return {f"{at}.in_proj_{leaf}": torch.cat(parts)}
    return {}


def _frozen(model: nn.Module, names: list[str]) -> list[Tensor]:
    """Parameters as they are while no set is merged."""
    held = frozen_weights(model, select(model, names))
    return [held[name].detach() for name in names]
