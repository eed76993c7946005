"""A file's low-rank set without a backbone: its factors need only the shapes of the sites."""

from __future__ import annotations

import torch
from torch import Tensor

from .banks import BANK
from .errors import AdaptError, StoreError
from .recipe import Adapter
from .sets import AdapterSet, check_tensors
from .sites import Site
from .store import AdapterFile, check_fit


def unattached(file: AdapterFile, path: object) -> AdapterSet:
    """The set of a file that was read from `path`, filled; other methods are refused by name."""
    try:
        file.recipe.check(file.sites)
        _refuse_forged_bank(file)
        bank = file.recipe.build_bank(file.sites, _own())
        adapters = [_adapter(file, site) for site in file.sites]
        made = AdapterSet(file.name, file.recipe, file.sites, adapters, bank)
        check_fit(file.tensors, made.state_dict())
        made.load_state_dict(file.tensors)
    except AdaptError as error:
        raise StoreError(f"{path}: {error}") from error
    made.head, made.extra = file.head, file.extra
    return made


def _refuse_forged_bank(file: AdapterFile) -> None:
    """Before shapes that the file does not fill ask for memory."""
    shapes = file.recipe.bank_shapes(file.sites)
    wanted = {f"{BANK}/{key}": torch.empty(s, device="meta") for key, s in shapes.items()}
    held = {k: t for k, t in file.tensors.items() if k.startswith(f"{BANK}/")}
    check_tensors(held, wanted, "the file")


def _adapter(file: AdapterFile, site: Site) -> Adapter:
    least = file.recipe.least_numbers(site)
    if least is None:
        raise StoreError(
            f"{type(file.recipe).__name__} has no low-rank update: it combines alone at weight 1"
            " only"
        )
    held = sum(t.numel() for key, t in file.tensors.items() if key.startswith(f"{site.name}/"))
    if held < least:  # before a forgery asks for memory
        raise StoreError(f"{site.name} has too few numbers for its shape {list(site.shape)}")
    # A weight of zeros that takes no memory: of the frozen one only the shape is needed.
    weight: Tensor = torch.zeros(()).expand(site.shape)
    return file.recipe.build(site, weight, _own())


def _own() -> torch.Generator:
    """Random numbers that move nobody's state."""
    return torch.Generator().manual_seed(0)
