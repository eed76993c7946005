"""LoRA, with the rank-stabilised scale (rsLoRA) and LoRA+'s learning rates.

Sources: LoRA arXiv 2106.09685 eq. 3, rsLoRA 2312.03732, LoRA+ 2402.12354.
Ours: the Gaussian start has a declared standard deviation (1/sqrt(d_in) unless given), a rank may
be set per site, and dropout is refused where a weight is read rather than a layer called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..errors import AdaptError
from ..kernels.dispatch import runs_kernel
from ..kernels.lowrank_linear import lowrank_linear
from ..patterns import parse
from ..precision import widened
from ..recipe import Adapter, Recipe, decay_groups, require, require_finite, require_rank

if TYPE_CHECKING:
    from ..layers import FrozenLayer
    from ..sites import Site

Scaling = Literal["standard", "rank_stabilised"]
Init = Literal["kaiming", "gaussian"]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Pair:
    """What one site starts from: A [r, d_in], B [d_out, r], fp32 on the CPU."""

    A: Tensor
    B: Tensor
    scale: float
    dropout: float
    embedding: bool


class PairAdapter(Adapter):
    """The trainable factors A [r, d_in] and B [d_out, r] of one site."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.A = nn.Parameter(pair.A)
        self.B = nn.Parameter(pair.B)
        self.scale = pair.scale
        self.dropout = pair.dropout
        self.embedding = pair.embedding

    def drops(self, x: Tensor) -> bool:
        """Dropout acts now: row numbers (an embedding's input) are never dropped."""
        return self.dropout > 0 and self.training and x.is_floating_point()

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"


class LoRAAdapter(PairAdapter):
    """W' = W + s B A, or y' = y + s B (A drop(x))."""

    def factors(self) -> tuple[Tensor, Tensor, None, float]:
        """(A, B, None, s)."""
        return self.A, self.B, None, self.scale

    def weight(self, w: Tensor) -> Tensor:
        """W [d_out, d_in] + s B A, added in fp32 (fp64 for an fp64 weight)."""
        return widened(w, self.A, self.B, self.scale).to(w.dtype)

    def output(self, x: Tensor, y: Tensor, layer: FrozenLayer) -> Tensor:
        """y + s B A drop(x), the factors in x's dtype, the result in y's."""
        if self.drops(x):
            x = F.dropout(x, self.dropout)
        return with_branch(x, y, layer, self.A, self.B, self.scale)


def with_branch(
    x: Tensor,
    y: Tensor,
    layer: FrozenLayer,
    a: Tensor,
    b: Tensor,
    scale: float,
    weights: Tensor | None = None,
) -> Tensor:
    """y + s B diag(p) A x, the factors in x's dtype, the result in y's; p [r] is 1 unless given."""
    if _fuses(x, y, layer):
        wide = torch.promote_types(y.dtype, torch.float32)
        p = None if weights is None else weights.to(wide)
        return lowrank_linear(x.to(y.dtype), None, a, b, scale, base=y, weights=p)
    a = a if weights is None else weights[:, None] * a  # the small factor: nothing more is kept
    dtype = x.dtype if x.is_floating_point() else y.dtype
    branch = layer.up(layer.down(x, a.to(dtype)), b.to(dtype))
    return torch.add(y, branch, alpha=scale).to(y.dtype)


def _fuses(x: Tensor, y: Tensor, layer: FrozenLayer) -> bool:
    """One kernel adds the branch, so that y is read and written once.

    The compiler and torch.func follow plain operations, which the former fuses itself.
    """
    linear = layer.kind in ("linear", "transposed linear") and x.is_floating_point()
    return y.is_cuda and linear and not traced() and runs_kernel(y)


def traced() -> bool:
    """The compiler or torch.func follows the operations."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


@dataclass(frozen=True, kw_only=True)
class LoRA(Recipe):
    """W' = W0 + s B A with A [r, d_in], B [d_out, r] = 0 (arXiv 2106.09685 eq. 3).

    `alpha` is the rank unless given, and is then a plain number: `replace(rank=...)` keeps it.
    `scaling`: s = alpha / r, or alpha / sqrt(r) for `rank_stabilised` (2312.03732).
    `init`: A uniform in +-1/sqrt(d_in) (`kaiming`), or normal with standard deviation `init_std`,
    1/sqrt(d_in) unless given (`gaussian`). At embeddings A = 0 and B is standard normal.
    `ranks`: site pattern -> rank there; s then follows that rank.
    `lr_ratio`: B learns that much faster than A (LoRA+, 2402.12354, which advises about 16); when
    it is not 1, the factors of embeddings learn at `embedding_lr`.
    Raises `AdaptError` for sites without a weight matrix and for ranks that do not fit.

    >>> LoRA(rank=16, alpha=16, scaling="rank_stabilised").scale_of(16)
    4.0
    """

    rank: int = 8
    alpha: float | None = None
    scaling: Scaling = "standard"
    init: Init = "kaiming"
    init_std: float | None = None
    dropout: float = 0.0
    ranks: Mapping[str, int] = field(default_factory=dict, hash=False)
    lr_ratio: float = 1.0
    embedding_lr: float = 1e-6

    def __post_init__(self) -> None:
        name = type(self).__name__
        require_rank(name, self.rank)
        alpha = float(self.rank) if self.alpha is None else self.alpha
        object.__setattr__(self, "alpha", alpha)  # the number that acts is the number that is saved
        plain = isinstance(self.ranks, Mapping)
        require(plain, f"{name}: ranks={self.ranks!r} is not allowed: site pattern -> rank")
        object.__setattr__(self, "ranks", dict(self.ranks))
        require_finite(
            name,
            alpha=alpha,
            dropout=self.dropout,
            lr_ratio=self.lr_ratio,
            embedding_lr=self.embedding_lr,
        )
        require(alpha != 0, f"{name}: alpha=0 is not allowed: the update would always be zero")
        require(0 <= self.dropout < 1, f"{name}: dropout={self.dropout!r} is not in [0, 1)")
        for key in ("lr_ratio", "embedding_lr"):
            value = getattr(self, key)
            require(value > 0, f"{name}: {key}={value!r} is not allowed: a number above 0")
        self._check_choices(name)
        for pattern, rank in self.ranks.items():
            parse(pattern)
            require_rank(name, rank)

    def _check_choices(self, name: str) -> None:
        for key, choices in (("scaling", get_args(Scaling)), ("init", get_args(Init))):
            value = getattr(self, key)
            allowed = " or ".join(choices)
            require(value in choices, f"{name}: {key}={value!r} is not allowed: {allowed}")
        if self.init_std is not None:
            require_finite(name, init_std=self.init_std)
            require(
                self.init == "gaussian" and self.init_std > 0,
                f"{name}: init_std={self.init_std!r} is not allowed: a number above 0, and only"
                " with init='gaussian'",
            )

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        """The factors at one site."""
        return LoRAAdapter(self.pair(site, weight, generator))

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse a pattern of `ranks` that no site fits."""
        check_fitting(type(self).__name__, "ranks", self.ranks, sites)

    def renamed(self, names: Mapping[Site, str]) -> Self:
        """`ranks` by the new names of the sites that its patterns fit."""
        return self.replace(
            ranks={n: rank for p, rank in self.ranks.items() for n in fitted(p, names)}
        )

    def rank_at(self, site: Site) -> int:
        """The rank of `ranks` there, else `rank`; patterns that disagree are refused."""
        return at_site(type(self).__name__, "ranks", self.ranks, site, self.rank)

    def least_numbers(self, site: Site) -> int | None:
        """A and B."""
        return self.rank_at(site) * sum(site.shape)

    def scale_of(self, rank: int) -> float:
        """s for a site of that rank."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(rank) if self.scaling == "rank_stabilised" else rank)

    def pair(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Pair:
        """Start values with B A = 0, drawn in fp32 on the CPU."""
        name = type(self).__name__
        d_out, d_in = require_matrix(name, site, weight)
        rank = self.rank_at(site)
        require_rank(name, rank, site)
        if self.dropout and site.slot != "output":
            raise AdaptError(
                f"{name}: dropout={self.dropout} cannot act on {site.name}: {site.why}, so the"
                " adapter never sees an input; set dropout=0"
            )
        embedding = site.kind == "embedding"
        a = torch.empty(rank, d_in, dtype=torch.float32, device="cpu")
        b = torch.zeros(d_out, rank, dtype=torch.float32, device="cpu")
        if embedding:
            a.zero_()
            b.normal_(generator=generator)
        elif self.init == "gaussian":
            a.normal_(std=self.init_std or d_in**-0.5, generator=generator)
        else:
            a.uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator)
        return Pair(a, b, self.scale_of(rank), self.dropout, embedding)

    def parameter_groups(
        self, adapters: Mapping[str, Adapter], lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """LoRA+: B and vectors at lr * lr_ratio, embeddings' factors at embedding_lr, A at lr."""
        if self.lr_ratio == 1:
            return super().parameter_groups(adapters, lr, weight_decay)
        by_rate: dict[float, list[nn.Parameter]] = {}
        for adapter in adapters.values():
            for name, tensor in adapter.named_parameters():
                if tensor.requires_grad:
                    by_rate.setdefault(self._rate(adapter, name, tensor, lr), []).append(tensor)
        groups = (decay_groups(tensors, rate, weight_decay) for rate, tensors in by_rate.items())
        return [group for pair in groups for group in pair]

    def _rate(self, adapter: Adapter, name: str, tensor: Tensor, lr: float) -> float:
        if tensor.ndim <= 1:
            return lr * self.lr_ratio
        if getattr(adapter, "embedding", False):
            return self.embedding_lr
        return lr * self.lr_ratio if name == "B" else lr


def require_matrix(method: str, site: Site, weight: Tensor | None) -> tuple[int, int]:
    """(d_out, d_in) of a site that has a weight matrix; other sites are refused by name."""
    if weight is None or len(site.shape) != 2:
        what = "a whole module" if weight is None else f"of shape {list(site.shape)}"
        raise AdaptError(
            f"{method}: {site.name} is {what}: a low-rank update needs a weight matrix"
        )
    return site.shape[0], site.shape[1]


def fits(pattern: str, site: Site) -> bool:
    """A pattern of the site language (without need of the backbone) names this site.

    >>> from ..sites import Site
    >>> site = Site("h.0.attn", "weight", "q", (0, 4), "linear", (4, 4), "output", "")
    >>> fits("h.*.attn[q,v]", site), fits("h.1.attn", site)
    (True, False)
    """
    paths = (site.path, f"{site.path}.{site.parameter}")
    return any(
        choice.matcher(tail=True).fullmatch(path) is not None
        for choice in parse(pattern)
        if not choice.parts or site.part in choice.parts
        for path in paths
    )


def check_fitting(
    method: str, setting: str, by_pattern: Mapping[str, Any], sites: Sequence[Site]
) -> None:
    """Refuse a pattern that no site fits."""
    for pattern in by_pattern:
        require(
            any(fits(pattern, site) for site in sites),
            f"{method}: {setting} has {pattern!r}, which fits none of the"
            f" {len(sites)} sites ({', '.join(s.name for s in sites[:3])}, ...)",
        )


def at_site(
    method: str, setting: str, by_pattern: Mapping[str, Value], site: Site, default: Value
) -> Value:
    """What the patterns say of this site, else the default; those that disagree are refused."""
    held = by_pattern.items()
    found = {(type(value), value): p for p, value in held if fits(p, site)}  # 1 is not 1.0
    require(
        len(found) <= 1,
        f"{method}: {setting} gives {site.name} different {setting}:"
        f" {' and '.join(map(repr, found.values()))}; let one pattern fit it",
    )
    return next((value for _, value in found), default)


def fitted(pattern: str, names: Mapping[Site, str]) -> list[str]:
    """The new names of the sites that a pattern fits; itself where it fits none."""
    return [name for site, name in names.items() if fits(pattern, site)] or [pattern]
