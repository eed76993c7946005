"""Attach a recipe to a frozen backbone; what comes back is trained, saved, switched, merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from .activation import wanted
from .banks import owners, share
from .drawer import (
    Drawer,
    check_set_name,
    drawer_of,
    find_drawer,
    make_drawer,
    remove_drawer,
    same_device,
)
from .errors import AdaptError, SiteError
from .kinds import layer_at
from .recipe import ActsOnOutput, ActsOnWeight, Adapter, Recipe, offers
from .sites import Site, Sites, select
from .wiring import unwire, wire


class AdapterSet(nn.Module):
    """All adapters of one name on one backbone, in the order of their sites.

    Made by `attach` and `load`. Printing it shows the sites and the counts.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        sites: Sites,
        adapters: Sequence[Adapter],
        bank: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.recipe = recipe
        self.sites = sites
        self.modules_in_order = nn.ModuleList(adapters)
        self.bank = bank
        share(bank, adapters)
        self.trainable = True
        self.extra: dict[str, Any] = {}
        """JSON values that travel in the file: labels of a head, preprocessing, backbone name."""
        self.head: dict[str, Tensor] = {}
        """Tensors of a task's head that travel in the file."""

    @property
    def backbone(self) -> nn.Module:
        """The module that this set is attached to."""
        if "drawer" not in self.__dict__:
            raise AdaptError(f"set {self.name!r} is detached: attach or load it again")
        backbone: nn.Module = self.__dict__["drawer"].__dict__["backbone"]
        return backbone

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Site name -> adapter."""
        return {s.name: a for s, a in zip(self.sites, self.modules_in_order, strict=True)}  # type: ignore[misc]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Every tensor of the set under `site/parameter`, those of its bank under `.bank/`."""
        return _named(owners(self.bank, self.adapters))

    def deployed_state(self) -> dict[str, Tensor]:
        """The same of what inference needs: what the saved file holds."""
        adapters = {site: adapter.deployed() for site, adapter in self.adapters.items()}
        return _named(owners(self.bank, adapters))

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter under its name in `state_dict`."""
        held = owners(self.bank, self.adapters).items()
        return {f"{o}/{key}": p for o, module in held for key, p in module.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Copy tensors in; every name and shape must fit, else nothing is changed."""
        own = self.state_dict()
        check_tensors(state, own, f"set {self.name!r}")
        self.recipe.check_state(state, own)
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(state[key])

    def pairs(self) -> list[tuple[Site, Adapter]]:
        """Every site with its adapter."""
        return list(zip(self.sites, self.adapters.values(), strict=True))

    def trainable_count(self) -> int:
        """Numbers that an optimiser gets."""
        return sum(p.numel() for p in self.parameters())

    def stored_count(self) -> int:
        """Numbers in the saved file (what inference needs)."""
        return sum(tensor.numel() for tensor in self.deployed_state().values())

    def penalty(self) -> Tensor:
        """What the method adds to the loss (0 when it adds nothing)."""
        return self.recipe.penalty(self.adapters)

    def after_step(self, step: int, total: int | None = None) -> None:
        """Call after each optimiser step and before zero_grad."""
        self.recipe.after_step(self.adapters, step, total)

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Optimiser groups as the recipe wants them."""
        return self.recipe.parameter_groups(self.adapters, lr, weight_decay)

    def report(self) -> str:
        """Sites, slots and counts as a table."""
        counts = f"{self.trainable_count():,} trainable, {self.stored_count():,} stored"
        head = f"{self.name}: {self.recipe}, {len(self.sites)} sites, {counts}"
        return f"{head}\n{self.sites}" if self.sites else head

    def __repr__(self) -> str:
        return self.report()

    def save(self, path: str | Path, *, training_state: bool = False) -> None:
        """Write one self-sufficient file; see `store.save`."""
        from .store import save

        save(self, path, training_state=training_state)

    def merge(self) -> None:
        """Write W' into new parameters of the backbone; `unmerge` gives the old ones back."""
        from .merge import merge

        merge(self)

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        from .merge import unmerge

        unmerge(self)

    def detach(self) -> None:
        """Take the set out; after the last one the backbone is as it was before."""
        detach(self)

    def freeze(self) -> None:
        """No tensor of this set requires grad any more."""
        self.trainable = False
        self.requires_grad_(False)

    def require_grads(self) -> None:
        """Active sets require grad, unless frozen."""
        if self.trainable:
            for parameter in self.parameters():
                if not parameter.requires_grad:
                    parameter.requires_grad_(True)

    def refuse_on_top_of(self, earlier: AdapterSet) -> None:
        """Some methods read the frozen weight; and a weight is read before its layer returns."""
        taken = {(s.path, s.parameter): _on_output(s, a) for s, a in earlier.pairs()}
        for site, adapter in self.pairs():
            key = site.path, site.parameter
            if taken.get(key) and not _on_output(site, adapter):
                raise AdaptError(
                    f"set {self.name!r} acts on the weight of {site.name}, {earlier.name!r} on what"
                    f" the layer returns: name {self.name!r} first"
                )
            if adapter.needs_first and key in taken:
                raise AdaptError(
                    f"set {self.name!r} ({type(self.recipe).__name__}) reads the frozen weight of"
                    f" {site.name}: name it before {earlier.name!r}"
                )


def attach(
    model: nn.Module,
    recipe: Recipe,
    at: str | Iterable[str] | Sites | None = None,
    name: str = "default",
    *,
    probe: Tensor | Callable[[], Any] | None = None,
    generator: Generator | None = None,
) -> AdapterSet:
    """Freeze `model`, put an adapter on each site of `at`, and make the set the default.

    `at` is a pattern, several, or the result of `select`; without it the method's own sites.
    `probe` (a batch, or a callable that runs a forward and returns its output) proves by one
    backward that every adapter acts. Nothing is changed when anything is refused.

    >>> from polyadapt.core import LoRA, attach
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> attach(model, LoRA(rank=2), at="0").trainable_count()
    32
    """
    if not isinstance(recipe, Recipe):
        raise AdaptError(f"recipe must be a method such as LoRA(rank=8), got {recipe!r}")
    sites = select(model, recipe.default_at(model) if at is None else at)
    if not sites and not (at is None or isinstance(at, Sites)):
        raise AdaptError("at names no sites: a pattern such as 'blocks.*.attn.qkv[q,v]'")
    made = build_set(model, recipe, sites, name, generator)
    before = find_drawer(model)
    acting = before.default.names if before else None
    install(model, made)
    if probe is not None:
        from .probe import prove

        try:
            prove(made, probe)
        except BaseException:
            detach(made)
            if acting is not None:
                switch(model, acting)
            raise
    return made


def switch(backbone: nn.Module, names: str | Sequence[str] | None) -> None:
    """Change which sets act outside of any `activate`; the others stop requiring grad.

    Under torch.compile, run backward before switching: compiled code cannot note which sets a
    forward used, and the gradients of sets that stopped requiring grad would be lost.
    """
    drawer = drawer_of(backbone)
    drawer.default = drawer.checked(wanted(names))
    drawer.rest()


def sets_of(backbone: nn.Module) -> dict[str, AdapterSet]:
    """The sets attached to a backbone, by name."""
    drawer = find_drawer(backbone)
    return {} if drawer is None else drawer.sets


def detach(adapter_set: AdapterSet) -> None:
    """Take one set out of its backbone."""
    backbone = adapter_set.backbone
    drawer: Drawer = adapter_set.__dict__["drawer"]
    if any(active.uses(adapter_set.name) for active in list(drawer.open.values())):
        raise AdaptError(
            f"set {adapter_set.name!r} cannot be detached while a context (`activate`, `route`)"
            " promises that it acts: leave the context first"
        )
    if drawer.merged == adapter_set.name:
        adapter_set.unmerge()
    unwire(drawer, adapter_set)
    del drawer.holder[f"set_{adapter_set.name}"]
    del adapter_set.__dict__["drawer"]
    if drawer.sets:
        switch(backbone, [n for n in drawer.default.names if n != adapter_set.name])
    else:
        remove_drawer(drawer)


def _build(model: nn.Module, recipe: Recipe, site: Site, generator: Generator | None) -> Adapter:
    layer = layer_at(model, site)
    weight = None if site.parameter is None else layer.matrix().detach()
    adapter = recipe.build(site, weight, generator)
    wanted_slot = ActsOnWeight if site.slot == "weight" else ActsOnOutput
    if not offers(adapter, wanted_slot) and not (
        site.slot == "output" and offers(adapter, ActsOnWeight) and site.kind != "block"
    ):
        raise SiteError(
            f"{type(recipe).__name__} cannot act on {site.name}: {site.why}, so the method needs a"
            f" {site.slot} form; methods with one act there (LoRA, DoRA), or choose other sites"
        )
    return adapter


def _on_output(site: Site, adapter: Adapter) -> bool:
    """The adapter changes what the layer returns, not the weight that it reads."""
    return site.slot == "output" and offers(adapter, ActsOnOutput)


def build_set(
    model: nn.Module, recipe: Recipe, sites: Sites, name: str, generator: Generator | None
) -> AdapterSet:
    """The adapters of a set, not yet in any slot: the model is only read."""
    check_set_name(name, sets_of(model))
    recipe.check(sites)
    bank = recipe.build_bank(sites, generator)
    adapters = [_build(model, recipe, site, generator) for site in sites]
    recipe.check_model(model, sites)
    made, device = AdapterSet(name, recipe, sites, adapters, bank), same_device(model)
    return (made if device.type == "cpu" else made.to(device)).train(model.training)


def install(backbone: nn.Module, made: AdapterSet) -> None:
    """Freeze the backbone, put the set into slots and make it the default."""
    existing = find_drawer(backbone)
    if existing is not None and existing.kept:
        raise AdaptError("a set is merged into the weights: unmerge it before attaching another")
    drawer = make_drawer(backbone)
    try:
        wire(drawer, made)
    except SiteError:
        if not drawer.sets:
            remove_drawer(drawer)
        raise
    drawer.freeze()
    drawer.holder[f"set_{made.name}"] = made
    made.__dict__["drawer"] = drawer
    switch(backbone, made.name)


def _named(held: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{o}/{key}": t for o, module in held.items() for key, t in module.state_dict().items()}


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """Names and shapes are exactly those wanted, and every number is finite."""
    for key in wanted:
        if key not in found:
            raise AdaptError(f"{what}: tensor {key!r} is missing")
    for key, tensor in found.items():
        if key not in wanted:
            raise AdaptError(f"{what}: tensor {key!r} does not belong to it")
        if tensor.shape != wanted[key].shape:
            raise AdaptError(
                f"{what}: {key!r} is {list(tensor.shape)}, expected {list(wanted[key].shape)}"
            )
        if not all_finite(tensor):
            raise AdaptError(f"{what}: {key!r} holds NaN or infinity")


def all_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity.

    >>> all_finite(torch.tensor([3e38, 3e38])), all_finite(torch.tensor([1.0, float("inf")]))
    (True, False)
    """
    if not tensor.is_floating_point():
        return True
    total = float(tensor.detach().sum(dtype=torch.float64))  # one pass, no copy; finite: all are
    return math.isfinite(total) or bool(tensor.isfinite().all())
