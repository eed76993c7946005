"""A trainable copy of a frozen tensor: what full fine-tuning, BitFit and LayerNorm tuning share.

The copy, not a difference to W0, so that weight decay pulls the weight itself towards zero, as it
does when the backbone is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..drawer import DRAWER
from ..recipe import Adapter, require

if TYPE_CHECKING:
    from ..sites import Site


class Replacement(Adapter):
    """W' = its own tensor, at first equal to W0 bit for bit.

    >>> Replacement(torch.ones(2)).weight(torch.zeros(2)).tolist()
    [1.0, 1.0]
    """

    needs_first = True  # it ignores what another set made of the weight

    def __init__(self, w0: Tensor) -> None:
        super().__init__()
        dtype = torch.promote_types(w0.dtype, torch.float32)  # small steps vanish in bf16
        # A copy keeps the strides, so that reading a transposed layer's weight moves no data.
        self.value = nn.Parameter(w0.detach().to(dtype, copy=True))

    def weight(self, w: Tensor) -> Tensor:
        """The trained tensor in w's dtype."""
        # Without grad it must require none, as W0: torch picks kernels by that flag even then.
        value = self.value if torch.is_grad_enabled() else self.value.detach()
        return value.to(w.dtype)


def replacement(method: str, site: Site, weight: Tensor | None) -> Replacement:
    """A trainable copy of the site's tensor; a block has none and is refused."""
    require(weight is not None, f"{method}: {site.name} is a whole module: name its parameters")
    assert weight is not None, "just required"
    floating = weight.is_floating_point()
    require(floating, f"{method}: {site.name} holds {weight.dtype}: it cannot be trained")
    return Replacement(weight)


def backbone_parameters(model: nn.Module) -> list[str]:
    """Names of the floating parameters of a backbone, without those of sets attached to it."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and DRAWER not in name.split(".")
    ]
