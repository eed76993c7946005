"""S2-LoRA's sparse form: the ranks that are alive anywhere, and each site's few coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

from .adapters.s2lora import S2LoRA, S2LoRAAdapter
from .banks import BANK
from .errors import AdaptError
from .live_ranks import alive
from .recipe import require
from .sets import AdapterSet
from .sites import Sites

VALUES = (torch.float16, torch.bfloat16, torch.float32)


def compact(
    adapters: AdapterSet,
    tau: float = 0.0,
    eps: float = 0.0,
    values: torch.dtype = torch.float16,
) -> tuple[S2LoRA, Sites, dict[str, Tensor]]:
    """An S2-LoRA set without what is dead: recipe, sites and tensors for `save_form` or `attach`.

    At site m the ranks K_m = {k: |lam_k| > tau max |lam| and > eps} are kept, as int16 numbers and
    `values`; sites with none are left out, and the bank loses the ranks that no site keeps. With
    two bytes per value the tensors take 2 (bank numbers) + 4 sum |K_m| bytes. What loads is an
    ordinary set that multiplies by its live ranks alone: with fp32 values its update is the set's,
    number for number (sums over fewer terms may round differently); fp16 rounds all numbers.
    Raises `AdaptError` for other methods, when nothing is alive, and for other values.

    >>> from torch import nn
    >>> from .sets import attach
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> made = attach(model, S2LoRA(rank=4), at="0")
    >>> _ = made.adapters["0"].lam.data.copy_(torch.tensor([0.0, 1.0, 0.0, -2.0]))
    >>> recipe, sites, tensors = compact(made)
    >>> recipe.rank, {name: list(t.shape) for name, t in tensors.items()}
    (2, {'.bank/A_8': [2, 8], '.bank/B_8': [8, 2], '0/lam': [2], '0/index': [2]})
    """
    recipe, bank = adapters.recipe, adapters.bank
    if not isinstance(recipe, S2LoRA):
        raise AdaptError(f"compact is a form of S2LoRA's sets, not of {type(recipe).__name__}'s")
    assert bank is not None, "S2LoRA has one"
    allowed = ", ".join(map(str, VALUES))
    require(values in VALUES, f"compact: values={values} is not allowed: {allowed}")
    dense = {site: _dense(adapter, recipe.rank) for site, adapter in adapters.pairs()}
    masks = {site: alive(lam, tau, eps) for site, lam in dense.items()}
    masks = {site: mask for site, mask in masks.items() if bool(mask.any())}
    require(bool(masks), f"set {adapters.name!r} has no live rank: there is nothing to keep")
    used = torch.stack(list(masks.values())).any(0)
    rank, sites = int(used.sum()), Sites(masks)
    counts = {site.name: int(mask.sum()) for site, mask in masks.items()}
    own = recipe.replace(rank=rank, alpha=recipe.scale * rank, kept=counts)
    tensors = {}
    for name in own.bank_shapes(sites):
        factor: Tensor = bank.get_parameter(name).detach()
        factor = factor[used] if name.startswith("A") else factor[:, used]
        tensors[f"{BANK}/{name}"] = factor.to(values)
    for site, mask in masks.items():
        tensors[f"{site.name}/lam"] = dense[site][mask].to(values)
        tensors[f"{site.name}/index"] = mask[used].nonzero().flatten().to(torch.int16)
    return own, sites, tensors


def _dense(adapter: object, rank: int) -> Tensor:
    """lam [r] with its zeros, also of an adapter that is compact already."""
    assert isinstance(adapter, S2LoRAAdapter), "an adapter of S2LoRA"
    lam = adapter.lam.detach()
    if adapter.index is None:
        return lam
    return lam.new_zeros(rank).index_copy(0, adapter.index.long(), lam)
