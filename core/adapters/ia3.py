"""(IA)^3: one trained gain per channel, on what a layer puts out or on what it takes in.

Source: arXiv 2205.05638, whose formula is l * (W x): gains on keys and values, and on the state
inside the feed-forward branch, that is, on the input of its second layer.
Ours: the gain scales W x and never the bias (PEFT, as installed, scales both), so that both forms
agree and merging changes one weight; parts of fused projections have gains of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Generator, Tensor, nn

from ..recipe import Adapter, Recipe, require
from .bottleneck import transformer_blocks
from .lora import fits, fitted, require_matrix

if TYPE_CHECKING:
    from ..layers import FrozenLayer
    from ..sites import Site

DOWN_PROJECTIONS: Final = ("mlp.fc2",)
SCALED_INPUTS: Final = ("linear", "transposed linear", "parameter")


class OutputGain(Adapter):
    """W' = diag(l) W with l [d_out], or y' = l * (y - b) + b."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, dtype=torch.float32, device="cpu"))

    def weight(self, w: Tensor) -> Tensor:
        """diag(l) W, multiplied in fp32 (fp64 for an fp64 weight)."""
        return (self.gain[:, None] * w).to(w.dtype)

    def output(self, x: Tensor, y: Tensor, layer: FrozenLayer) -> Tensor:
        """l * y + (1 - l) * b: gains of one leave y's bits, and y - b need not be kept."""
        gain, bias = layer.channels(self.gain), layer.bias
        scaled = gain * y if bias is None else gain * y + (1 - gain) * layer.channels(bias)
        return scaled.to(y.dtype)


class InputGain(Adapter):
    """W' = W diag(l) with l [d_in], or y' = W (l * x) + b."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, dtype=torch.float32, device="cpu"))

    def weight(self, w: Tensor) -> Tensor:
        """W diag(l), multiplied in fp32 (fp64 for an fp64 weight)."""
        return (w * self.gain).to(w.dtype)

    def enter(self, x: Tensor) -> Tensor:
        """l * x."""
        return (x * self.gain).to(x.dtype)

    def output(self, x: Tensor, y: Tensor, layer: FrozenLayer) -> Tensor:
        """The layer was called with l * x: nothing is left to do."""
        return y


@dataclass(frozen=True, kw_only=True)
class IA3(Recipe):
    """W' = diag(l) W, or W diag(l) at the sites that `inputs` names; l = 1 at the start.

    d_out numbers per site, d_in at sites of `inputs`: patterns of the site language, `mlp.fc2`
    (timm's second feed-forward layer) unless given, as the published method scales the state there.
    The bias is never scaled. Without `at`: keys, values and the second feed-forward layer of every
    block of a timm vision transformer. Source: arXiv 2205.05638, known to us by its formula and by
    PEFT's code. Gains are vectors, so weight decay leaves them alone.

    Under several sets at once, the gains on a layer's input come before all of them.

    Raises `AdaptError` for sites without a weight matrix, for `inputs` that fit no site, and for
    gains on the input of a convolution, an embedding, or a part of a layer that is called.

    >>> from polyadapt.core import attach
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> [len(a.gain) for a in attach(model, IA3(inputs=["1"]), at="{0,1}").adapters.values()]
    [3, 3]
    """

    inputs: Sequence[str] = DOWN_PROJECTIONS

    def __post_init__(self) -> None:
        listed = not isinstance(self.inputs, str) and all(isinstance(p, str) for p in self.inputs)
        require(listed, f"IA3: inputs={self.inputs!r} is not allowed: a list of patterns")
        object.__setattr__(self, "inputs", tuple(self.inputs))

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse a pattern of `inputs` that no site fits; the default may fit none."""
        for pattern in self.inputs:
            require(
                pattern in DOWN_PROJECTIONS or any(fits(pattern, site) for site in sites),
                f"IA3: inputs has {pattern!r}, which fits none of the {len(sites)} sites"
                f" ({', '.join(s.name for s in sites[:3])}, ...)",
            )

    def renamed(self, names: Mapping[Site, str]) -> IA3:
        """`inputs` by the new names of the sites that its patterns fit."""
        return self.replace(inputs=[name for p in self.inputs for name in fitted(p, names)])

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        """Gains of one."""
        d_out, d_in = require_matrix("IA3", site, weight)
        if not any(fits(pattern, site) for pattern in self.inputs):
            return OutputGain(d_out)
        require(
            site.kind in SCALED_INPUTS,
            f"IA3: {site.name} is of kind {site.kind}: inputs takes {', '.join(SCALED_INPUTS)}",
        )
        require(
            site.rows is None or site.slot == "weight",
            f"IA3: {site.name} is a part of a layer that is called, so its input is not its own:"
            " name the whole layer in inputs",
        )
        return InputGain(d_in)

    def default_at(self, model: nn.Module) -> Sequence[str]:
        """Keys, values and second feed-forward layers of a timm vision transformer."""
        blocks, known = transformer_blocks(model), dict(model.named_modules())
        lacking = [b for b in blocks if not {f"{b}.attn.qkv", f"{b}.mlp.fc2"} <= known.keys()]
        require(
            not lacking,
            f"IA3: {', '.join(lacking[:1])} of {type(model).__name__} has no attn.qkv and mlp.fc2:"
            " pass at= and inputs=",
        )
        return [f"{b}.{place}" for b in blocks for place in ("attn.qkv[k,v]", "mlp.fc2")]
