"""Attach the set of a PEFT folder: LoRA, rsLoRA, DoRA and AdaLoRA."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Generator, Tensor, nn

from ..drawer import DRAWER
from ..errors import AdaptError, StoreError
from ..kinds import is_called_layer, kind_of, layer_at, layer_class, stored_at
from ..readers import reach
from ..sets import AdapterSet, build_set, check_tensors, install
from ..sites import Site, Sites, select
from .config import MOST, PeftConfig, divisor, read_config, read_schedule
from .head import read_head
from .names import lookup, targeted
from .reads import refuse_unless_called
from .tensors import Place, by_path, own_shape, read_tensors, refuse_layer

if TYPE_CHECKING:
    from ..adapters.adalora import AdaLoRA
    from ..adapters.lora import LoRA, PairAdapter


@dataclass(frozen=True)
class _Layer:
    """One adapted layer: its place in the file, its site here, and its numbers."""

    place: Place
    site: Site
    rank: int
    scale: float
    kept: Sequence[int]
    """AdaLoRA: which of the rank's triplets the file holds."""


def import_peft(
    backbone: nn.Module, folder: str | Path, name: str | None = None, *, trainable: bool = False
) -> AdapterSet:
    """Attach what PEFT saved in `folder` (or at `hub:owner/name`) and make it the default.

    W' = W0 + s B A with s = alpha / r (alpha / sqrt(r) under use_rslora), DoRA's diag(m / n) W', or
    AdaLoRA's W0 + s B diag(E) A with s = alpha / (r + 1e-5); the factors are the file's, bit for
    bit. One number differs where a recipe has one alpha and the folder several (`alpha_pattern`):
    the ratio is folded into B. The set is fp64 if the factors or the weights are, else fp32.
    `modules_to_save`: tensors of modules that the backbone lacks go to `set.head` under their
    paths; for modules that it has, they must be the backbone's.
    Raises `AdaptError` for a setting or a layer that changes numbers in a way that has no form
    here, for a rank above the smaller side of its weight, and wherever PEFT would drop tensors or
    leave modules out without a word. Nothing is changed when anything is refused. Format: peft
    0.21.2.

    >>> import tempfile
    >>> from polyadapt.core import DoRA, attach, export_peft
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_peft(attach(model, DoRA(rank=2, alpha=6), at="0"), f"{folder}/pets")
    ...     import_peft(model, f"{folder}/pets", "again").recipe.alpha
    6.0
    """
    from .hub import local_folder

    path = local_folder(folder)
    config = read_config(path)
    adapters, others = by_path(read_tensors(path))
    try:
        made = _build(backbone, config, adapters, name or "default", trainable)
        made.head = read_head(backbone, config, others, set(adapters))
        made.extra = {"peft": config.labels()} if config.labels() else {}
        if not trainable:
            made.freeze()
        install(backbone, made)
    except AdaptError as error:
        raise StoreError(f"{folder}: {error}") from error
    return made


def _build(
    backbone: nn.Module,
    config: PeftConfig,
    found: Mapping[str, Mapping[str, Tensor]],
    name: str,
    trainable: bool,
) -> AdapterSet:
    layers = _layers(backbone, config, found)
    recipe = _recipe(config, layers, trainable)
    sites = Sites(layer.site for layer in layers)
    made = build_set(backbone, recipe, sites, name, Generator().manual_seed(0))
    read = [t for own in found.values() for t in own.values()]
    read += [layer_at(backbone, layer.site).stored for layer in layers]
    if any(t.dtype == torch.float64 for t in read):
        made.double()  # as PEFT does: DoRA's gain in fp32 would not give its fp64 outputs
    state = made.state_dict()
    for layer in layers:
        _fill(state, layer, found[layer.place.path], config.factors)
        if config.peft_type == "LORA":
            ours = cast("PairAdapter", made.adapters[layer.site.name]).scale
            state[f"{layer.site.name}/B"] *= layer.scale / ours  # 1 without alpha_pattern
    return made


def _layers(backbone: nn.Module, config: PeftConfig, found: Mapping[str, object]) -> list[_Layer]:
    modules = {n: m for n, m in backbone.named_modules() if DRAWER not in n.split(".")}
    wanted = targeted(config, modules)
    for path in sorted(wanted ^ set(found)):
        if path in wanted:
            raise StoreError(f"target_modules names {path}, of which there are no tensors")
        if path in modules:
            raise StoreError(f"target_modules leaves {path} out, of which there are tensors")
    if not found:
        raise StoreError("there are no tensors of adapters in it")
    ordered = [path for path in modules if path in found]
    missing = sorted(set(found) - set(ordered))
    wanted_sites = Sites(_site(backbone, modules.get(path), path) for path in missing + ordered)
    sites = select(backbone, wanted_sites)
    ranks = lookup("rank_pattern", config.rank_pattern, modules)
    alphas = lookup("alpha_pattern", config.alpha_pattern, modules)
    return [_layer(backbone, config, site, ranks, alphas) for site in sites]


def _site(backbone: nn.Module, module: nn.Module | None, path: str) -> Site:
    """The whole weight of a layer that PEFT's wrapper acts on as ours does."""
    if module is None:  # `select` says what is near
        return Site(path, "weight", None, None, "linear", (1, 1), "output", "")
    if not is_called_layer(module):
        raise StoreError(
            f"{path} is a {type(module).__name__}; allowed: Linear, Conv1D, Conv1d, Conv2d and"
            " Embedding"
        )
    stored_at(module, path, "weight")
    kind = kind_of(module, "weight")
    refuse_unless_called(backbone, path, module, kind)
    slot, why, _ = reach(backbone, path, module, "weight", kind)
    shape = tuple(layer_class(module, "weight")(module, "weight").matrix().shape)
    return Site(path, "weight", None, None, kind, shape, slot, why)


def _layer(
    backbone: nn.Module,
    config: PeftConfig,
    site: Site,
    ranks: Callable[[str, Any], Any],
    alphas: Callable[[str, float], float],
) -> _Layer:
    module = backbone.get_submodule(site.path)
    refuse_layer(config.peft_type, site.path, site.kind, module)
    kernel = tuple(module._parameters["weight"].shape[1:]) if "conv" in site.kind else ()  # type: ignore[union-attr]
    d_out, d_in = site.shape
    place = Place(config.peft_type, site.path, site.kind, d_out, d_in, kernel)
    if config.peft_type == "ADALORA":
        alpha = config.alpha if config.alpha > 0 else config.rank
        scale = alpha / (config.rank + 1e-5)
        return _Layer(place, site, config.rank, scale, _kept(config, site.path))
    rank = ranks(site.path, config.rank)
    if type(rank) is not int or not 1 <= rank <= MOST:
        raise StoreError(
            f"rank_pattern gives {site.path} {rank!r}; allowed: a whole number from 1 to {MOST:.0e}"
        )
    scale = alphas(site.path, config.alpha) / divisor(rank, config.rank_stabilised)
    return _Layer(place, site, rank, scale, range(rank))


def _kept(config: PeftConfig, path: str) -> Sequence[int]:
    """The triplets that AdaLoRA's `rank_pattern` keeps of a layer; all when it has no entry."""
    for key in (f"{path}.lora_E", f"{path}.lora_E.default"):
        mask = config.rank_pattern.get(key)
        if mask is None:
            continue
        flags = isinstance(mask, list) and all(type(flag) is bool for flag in mask)
        if not flags or len(mask) != config.rank:
            raise StoreError(f"rank_pattern of {key} is not {config.rank} times true or false")
        return [n for n, flag in enumerate(mask) if flag]
    return range(config.rank)


def _recipe(config: PeftConfig, layers: Sequence[_Layer], trainable: bool) -> LoRA | AdaLoRA:
    from ..adapters.adalora import AdaLoRA
    from ..adapters.dora import DoRA
    from ..adapters.lora import LoRA

    # Where a weight is read no input is seen to drop: that matters only in training.
    drops = trainable or all(layer.site.slot == "output" for layer in layers)
    dropout = config.dropout if drops else 0.0
    if config.peft_type == "ADALORA":
        _refuse_unused(config, layers)
        return AdaLoRA(
            initial_rank=config.rank,
            alpha=layers[0].scale * config.rank,
            dropout=dropout,
            allocate=trainable,
            **dataclasses.asdict(read_schedule(config)),
        )
    rank = Counter(layer.rank for layer in layers).most_common(1)[0][0]
    alphas = (layer.scale * divisor(layer.rank, config.rank_stabilised) for layer in layers)
    alpha = Counter(alphas).most_common(1)[0][0] if config.alpha_pattern else config.alpha
    return (DoRA if config.dora else LoRA)(
        rank=rank,
        alpha=alpha,
        scaling="rank_stabilised" if config.rank_stabilised else "standard",
        dropout=dropout,
        ranks={layer.site.path: layer.rank for layer in layers if layer.rank != rank},
    )


def _refuse_unused(config: PeftConfig, layers: Sequence[_Layer]) -> None:
    known = {f"{layer.site.path}.lora_E{end}" for layer in layers for end in ("", ".default")}
    unused = sorted(set(config.rank_pattern) - known)
    if unused:
        raise StoreError(f"rank_pattern names {unused[0]!r}, which is no adapted layer's lora_E")


def _fill(
    state: Mapping[str, Tensor], layer: _Layer, found: Mapping[str, Tensor], factors: str
) -> None:
    """Copy the file's tensors of one layer into the adapter's."""
    place, kept = layer.place, len(layer.kept)
    shapes = {place.key(f): place.shape(f, kept) for f in factors}
    wanted = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    check_tensors(found, wanted, f"rank {kept} at {place.path}")
    for factor in factors:
        own = state[f"{layer.site.name}/{factor}"]
        value = found[place.key(factor)].reshape(own_shape(layer.site.shape, factor, kept))
        if kept == layer.rank:
            own.copy_(value)
        else:  # the others are pruned: E = 0
            axis = 1 if factor == "B" else 0
            index = torch.tensor(layer.kept, dtype=torch.long, device=own.device)
            own.zero_().index_copy_(axis, index, value.to(own))
