"""Bottleneck: a small residual network beside a layer or a block.

The primitive of serial adapters (Houlsby, arXiv 1902.00751; Pfeiffer), AdaptFormer (arXiv
2205.13535), AdapterTune and MoSA; which of them it is, is a matter of the settings:

==============  ==================  ==========================================
placement       h                   example
==============  ==================  ==========================================
`serial`        the site's output   AdapterTune at `blocks.*`, Pfeiffer at `blocks.*.mlp`
`parallel`      the site's input    an adapter beside `blocks.*.mlp.fc1`
`parallel_ffn`  the state that      AdaptFormer and MoSA at `blocks.*`
                enters the MLP
==============  ==================  ==========================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..errors import SiteError
from ..layers import linear
from ..recipe import Adapter, Recipe, require, require_finite, require_rank

if TYPE_CHECKING:
    from ..layers import FrozenLayer
    from ..sites import Site

PLACEMENTS: Final = ("serial", "parallel", "parallel_ffn")
INITS: Final = ("zero", "small")
DOWN_INITS: Final = ("xavier", "kaiming")
ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "gelu": F.gelu,  # the exact one (erf)
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda h: h,
}
SMALL: Final = 1e-4  # standard deviation of B and b under init="small" (AdapterTune's code)
NORM_EPS: Final = 1e-6  # as in timm's ViT


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Recipe):
    """y' = y + scale * (B drop(act(A LN(h) + a)) + b), A [r, d_in], a [r], B [d_out, r], b [d_out].

    `scale` is absolute: it is never divided by the rank. `norm` adds a LayerNorm of the adapter's
    own. A is drawn from U(-t, t), t = sqrt(6 / (d_in + r)) for `xavier`, 1 / sqrt(d_in) for
    `kaiming`; a = 0; B and b are 0, or drawn from N(0, 1e-4^2) for init="small". Not linear, so
    not mergeable. Channels must be the last axis (Swin's [B, H, W, C] is; a convolution's is not).

    Raises `AdaptError` for a setting out of range, `SiteError` for a site that it cannot act on.

    >>> from polyadapt.core import Bottleneck, Site
    >>> site = Site("blocks.0", None, None, None, "block", (768,), "output", "a whole module")
    >>> sum(p.numel() for p in Bottleneck(rank=16).build(site, None, None).parameters())
    25360
    """

    rank: int = 16
    placement: str = "serial"
    activation: str = "gelu"
    norm: bool = False
    scale: float = 1.0
    dropout: float = 0.0
    init: str = "zero"
    down_init: str = "xavier"
    bias: bool = True

    def __post_init__(self) -> None:
        method = type(self).__name__
        require_rank(method, self.rank)
        require_finite(method, scale=self.scale)
        require_fraction(method, "dropout", self.dropout)
        require_choice(method, "placement", self.placement, PLACEMENTS)
        require_choice(method, "activation", self.activation, tuple(ACTIVATIONS))
        require_choice(method, "init", self.init, INITS)
        require_choice(method, "down_init", self.down_init, DOWN_INITS)

    @property
    def identity(self) -> bool:
        """Exactly the frozen backbone at the start, unless `init` is small."""
        return self.init == "zero"

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        return BottleneckAdapter(self, self.start(site, generator), site.name)

    def default_at(self, model: nn.Module) -> Sequence[str]:
        return transformer_blocks(model)

    def start(self, site: Site, generator: Generator | None) -> Projections:
        """The tensors at step 0, drawn in this order: A, B, b."""
        d_in, d_out = widths(site, self.placement)
        require(
            self.rank <= min(d_in, d_out),
            f"rank {self.rank} does not fit {site.name}, which maps {d_in} to {d_out} channels:"
            f" at most {min(d_in, d_out)}",
        )
        bounds = {"xavier": math.sqrt(6 / (d_in + self.rank)), "kaiming": 1 / math.sqrt(d_in)}
        t = bounds[self.down_init]
        down = _cpu(self.rank, d_in).uniform_(-t, t, generator=generator)
        up, shift = _cpu(d_out, self.rank), _cpu(d_out)
        if self.init == "small":
            up.normal_(0.0, SMALL, generator=generator)
            shift.normal_(0.0, SMALL, generator=generator)
        return Projections(
            down=down,
            up=up,
            down_bias=_cpu(self.rank) if self.bias else None,
            up_bias=shift if self.bias else None,
            norm_gain=_cpu(d_in) + 1 if self.norm else None,
            norm_bias=_cpu(d_in) if self.norm else None,
        )


class Projections(NamedTuple):
    """The tensors of one bottleneck; None for those that the settings leave out."""

    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    norm_gain: Tensor | None
    norm_bias: Tensor | None


class BottleneckAdapter(Adapter):
    """The bottleneck at one site."""

    def __init__(self, recipe: Bottleneck, tensors: Projections, where: str) -> None:
        super().__init__()
        self.recipe = recipe
        self.where = where
        if recipe.placement == "parallel_ffn":
            self.input = "ffn"
        for name, tensor in tensors._asdict().items():
            own = None if tensor is None else nn.Parameter(tensor.detach().clone())
            self.register_parameter(name, own)

    def tensors(self) -> Projections:
        """The trained tensors by name."""
        return Projections(*(getattr(self, name) for name in Projections._fields))

    def output(self, x: Tensor, y: Tensor, layer: FrozenLayer) -> Tensor:
        """x [..., d_in], y [..., d_out] -> y' of y's shape and dtype."""
        return add_bottleneck(self.recipe, self.tensors(), x, y, self.training, self.where)

    def extra_repr(self) -> str:
        rank, d_in = self.tensors().down.shape
        return f"{self.recipe.placement}, {d_in} -> {rank} -> {self.tensors().up.shape[0]}"


def add_bottleneck(
    recipe: Bottleneck, t: Projections, x: Tensor, y: Tensor, training: bool, where: str
) -> Tensor:
    """y + scale * (B drop(act(A LN(h) + a)) + b), computed in h's dtype, added in y's."""
    h = y if recipe.placement == "serial" else x
    d_in, d_out = t.down.shape[1], t.up.shape[0]
    if (h.shape[-1], y.shape[-1]) != (d_in, d_out) or h.numel() * d_out != y.numel() * d_in:
        raise SiteError(
            f"{where}: its {recipe.placement} adapter maps {d_in} to {d_out} channels on the last"
            f" axis, but was given {list(h.shape)} to add to {list(y.shape)}"
        )
    hidden = ACTIVATIONS[recipe.activation](_linear(_normed(h, t), t.down, t.down_bias))
    hidden = F.dropout(hidden, recipe.dropout, training)
    delta = _linear(hidden, t.up, t.up_bias).to(y.dtype)
    # Swin's MLP branch gets [B, H W, C], its block returns [B, H, W, C]. One addition, so that a
    # bf16 result is rounded once and `scale` never is.
    return torch.add(y, delta.reshape(y.shape), alpha=recipe.scale)


def _normed(h: Tensor, t: Projections) -> Tensor:
    if t.norm_gain is None or t.norm_bias is None:
        return h
    wide = torch.promote_types(h.dtype, torch.float32)  # gain and statistics stay fp32 under bf16
    gain, shift = t.norm_gain.to(wide), t.norm_bias.to(wide)
    return F.layer_norm(h.to(wide), h.shape[-1:], gain, shift, NORM_EPS).to(h.dtype)


def _linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype))


def _cpu(*shape: int) -> Tensor:
    """Zeros whose dtype and device no trainer's default changes."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def widths(site: Site, placement: str) -> tuple[int, int]:
    """(d_in, d_out) of a bottleneck at a site; a site that it cannot act on is refused by name."""
    called = {"block", "linear", "transposed linear"}
    allowed = {
        "serial": called | {"embedding"},
        "parallel": called,
        "parallel_ffn": {"block"},
    }[placement]
    if site.kind not in allowed:
        raise SiteError(
            f"{site.name}: a {placement} bottleneck cannot sit on a site of kind {site.kind}, only"
            f" on {', '.join(sorted(allowed))}: it acts on channels that are the last axis"
        )
    return (site.shape[-1] if placement == "parallel" else site.shape[0]), site.shape[0]


def transformer_blocks(model: nn.Module) -> list[str]:
    """Paths of a transformer's blocks in order: the list `blocks`, or Swin's `layers.N.blocks`.

    >>> import timm
    >>> transformer_blocks(timm.create_model("vit_tiny_patch16_224", depth=3))
    ['blocks.0', 'blocks.1', 'blocks.2']
    """
    lists = {path: module for path, module in model.named_modules() if _lists_blocks(module, path)}
    families = sorted({re.sub(r"\d+", "*", path) for path in lists})
    require(
        len(families) == 1,
        f"{type(model).__name__} has {' and '.join(families) or 'nothing'} where one list 'blocks'"
        " of transformer blocks is looked for: pass at='encoder.layer.*' or the like",
    )
    return [f"{path}.{i}" for path, module in lists.items() for i in range(len(module))]


def _lists_blocks(module: nn.Module, path: str) -> TypeGuard[nn.Sequential | nn.ModuleList]:
    """A list called `blocks` whose modules have attention; EfficientNet's are convolutions."""
    if path.split(".")[-1] != "blocks" or not isinstance(module, nn.Sequential | nn.ModuleList):
        return False
    return all(any("att" in name for name, _ in block.named_children()) for block in module)


def require_choice(method: str, name: str, value: object, allowed: Sequence[str]) -> None:
    """A setting is one of the names that are allowed."""
    names = ", ".join(allowed)
    require(value in allowed, f"{method}: {name}={value!r} is not allowed: one of {names}")


def require_fraction(method: str, name: str, value: float) -> None:
    """A probability from 0, below 1."""
    require_finite(method, **{name: value})
    require(0 <= value < 1, f"{method}: {name}={value!r} is not allowed: from 0, below 1")
