"""Prove that an attached set acts: after one backward every adapter must have a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .activation import _tensors, activate
from .errors import SiteError

if TYPE_CHECKING:
    from .sets import AdapterSet


def prove(adapter_set: AdapterSet, probe: Tensor | Callable[[], Any]) -> None:
    """Run `probe` (a batch for the backbone, or a callable that runs it) and one backward.

    Raises `SiteError` naming the sites whose adapters got no gradient at all: nothing calls or
    reads them, or their effect never reaches the output.
    """
    if not adapter_set.sites:
        return  # a method that trains only the task's head
    parameters = list(adapter_set.parameters())
    with activate(adapter_set.backbone, adapter_set.name), torch.enable_grad():
        output = probe() if callable(probe) else adapter_set.backbone(probe)
        outputs = [t for t in _tensors(output) if t.requires_grad]
        loss = sum((_weighted(t) for t in outputs), torch.zeros(()))
        if not outputs:
            raise SiteError(f"no adapter of {adapter_set.name!r} acts: the output depends on none")
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    check_gradients(adapter_set, dict(zip(map(id, parameters), gradients, strict=True)))


def check_gradients(adapter_set: AdapterSet, gradients: dict[int, Tensor | None]) -> None:
    """Every adapter has a tensor with a gradient that is not zero throughout.

    Where a bank's factor that starts at zero hides all of them, any gradient: it was called.
    """
    own = {
        site: [gradients.get(id(p)) for p in adapter.parameters()]
        for site, adapter in adapter_set.adapters.items()
    }
    acting = {site for site, found in own.items() if any(map(_acts, found))}
    shared = [] if adapter_set.bank is None else adapter_set.bank.parameters()
    if not acting and any(_acts(gradients.get(id(p))) for p in shared):
        acting = {site for site, found in own.items() if any(g is not None for g in found)}
    idle = [site for site in own if site not in acting]
    if idle:
        more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
        raise SiteError(
            f"{len(idle)} of {len(adapter_set.sites)} adapters of {adapter_set.name!r} do not act:"
            f" {', '.join(idle[:3])}{more}; nothing calls these layers or their effect is lost"
        )


def _acts(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.abs().max() > 0)


def _weighted(t: Tensor) -> Tensor:
    """A sum with uneven weights: the plain sum of a normalised output is constant."""
    weights = torch.linspace(-1.0, 1.0, t.numel(), device=t.device).cos().view(t.shape)
    return (t.float() * weights).sum()
