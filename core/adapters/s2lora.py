"""S2-LoRA: one low-rank pair for all sites, a short and sparse vector of coefficients for each.

Source: arXiv 2309.11756, read as its abstract and secondary notes only; no code of the authors was
found. The paper fixes: two low-rank matrices shared by the whole network, a coefficient per rank
and weight that is learnt and constrained to be sparse, encoder and decoder alike, foldable into the
weights. Ours: every formula here, that is the scale, both starts, the L1 term or the proximal step
and their strength, the orthogonality term, the warm-up, the rates, and how weights of several
shapes share (`share`); the paper's rule for those was not found, nor whether it adapts them at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..banks import bank_of
from ..errors import AdaptError
from ..optim.proximal import sparse_group
from ..precision import widened
from ..recipe import Adapter, Recipe, require, require_duration, require_finite, require_rank
from .adalora import INIT_STD, gram_error
from .lora import require_matrix, with_branch

if TYPE_CHECKING:
    from ..layers import FrozenLayer
    from ..sites import Site

Share = Literal["attn", "dim", "shape"]
Init = Literal["adalora", "lora"]
Sparsity = Literal["proximal", "loss"]
STRENGTH = {"proximal": 0.1, "loss": 1e-3}


class SharedFactors(nn.Module):
    """The matrices of a set: A_* [r, d_in] and B_* [d_out, r] by name, fp32 on the CPU."""

    def __init__(self, factors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, factor in factors.items():
            self.register_parameter(name, nn.Parameter(factor))


class S2LoRAAdapter(Adapter):
    """W' = W + s B diag(lam) A with lam [r] of its own, A and B of the bank.

    With `index` [n] (int16) lam is [n] and only those ranks of the bank take part.
    """

    bank: SharedFactors
    index: Tensor | None

    def __init__(
        self,
        lam: Tensor,
        names: tuple[str, str],
        scale: float,
        dropout: float = 0.0,
        index: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.lam = nn.Parameter(lam)
        self.names = names
        self.scale = scale
        self.dropout = dropout
        self.register_buffer("index", index)

    def factors(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """(A, B, lam, s)."""
        a, b = (cast("Tensor", getattr(self.bank, name)) for name in self.names)
        if self.index is not None:
            own = self.index.long()
            a, b = a.index_select(0, own), b.index_select(1, own)
        return a, b, self.lam, self.scale

    def weight(self, w: Tensor) -> Tensor:
        """W [d_out, d_in] + s B diag(lam) A, added in fp32 (fp64 for an fp64 weight)."""
        a, b, lam, scale = self.factors()
        return widened(w, lam[:, None] * a, b, scale).to(w.dtype)

    def output(self, x: Tensor, y: Tensor, layer: FrozenLayer) -> Tensor:
        """y + s B diag(lam) A drop(x), the factors in x's dtype, the result in y's."""
        a, b, lam, scale = self.factors()
        if self.dropout > 0 and self.training and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        return with_branch(x, y, layer, a, b, scale, lam)

    def rank(self) -> int:
        """Coefficients that are not zero."""
        return int(self.lam.count_nonzero())

    def extra_repr(self) -> str:
        return f"live={self.rank()} of {len(self.lam)}, scale={self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class S2LoRA(Recipe):
    """W' = W0 + s B diag(lam) A, s = alpha / rank; A, B shared by all sites, lam [rank] per site.

    `share`: `attn`, one A [r, d_in] and one B [d_out, r], so that all sites have one shape; `dim`,
    an A per distinct d_in and a B per distinct d_out; `shape`, a pair per distinct (d_out, d_in).
    `init`: lam = 0, A and B normal with deviation 0.02 (`adalora`: coefficients grow from nothing),
    or lam = 1, A uniform in +-1/sqrt(d_in), B = 0 (`lora`: they are thinned out). Both start as the
    frozen backbone. `alpha` is the rank unless given, so s = 1; lam may be negative.
    `sparsity`: `proximal`, after each optimiser step lam <- sign(lam) max(|lam| - lr l1, 0), with
    exact zeros, once the steps of `warmup` (whole) or their share (a fraction) are over; or `loss`,
    + l1 / (M r) times the sum of all |lam| of M sites, which Adam brings near zero and no further.
    `l1` is 0.1 or 1e-3 unless given. The former is the share of Adam's largest step that a
    coefficient must reach to stay alive, whatever M, r and the scale of the loss; as the prox of
    the latter, lr l1 / (M r), it would be about 1e-9 per step and prune nothing.
    Loss: + `orthogonality` times R, the mean over the distinct shared matrices of
    ||A A^T - I||_F^2 or ||B^T B - I||_F^2. Without it larger A and B would cheat the L1 term.
    lam learns at lr, the bank at lr `bank_lr_ratio`; neither decays (decay is not sparsity).

    What the paper fixes and what is ours: see the module's first lines. A training loop adds
    `set.penalty()` to its loss and calls `proximal_step(optimizer, step, total)` after each
    optimiser step; `AdaptedModule` does both.

    `kept` is set by `compact` alone: site -> coefficients that its file holds there, with the
    ranks that they belong to (int16).

    Raises `AdaptError` for settings out of range, sites without a weight matrix or of a rank that
    does not fit, and for sites of several shapes under `attn`.

    >>> from polyadapt.core import attach
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    >>> attach(model, S2LoRA(rank=4), at="{0,1}").trainable_count()  # 2 * 8 * 4 + 2 * 4
    72
    """

    rank: int = 32
    alpha: float | None = None
    share: Share = "attn"
    init: Init = "adalora"
    sparsity: Sparsity = "proximal"
    l1: float | None = None
    orthogonality: float = 0.1
    warmup: int | float = 0.1
    bank_lr_ratio: float = 0.1
    dropout: float = 0.0
    kept: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        require_rank("S2LoRA", self.rank)
        for name, allowed in (("share", Share), ("init", Init), ("sparsity", Sparsity)):
            value, known = getattr(self, name), get_args(allowed)
            require(
                isinstance(value, str) and value in known,
                f"S2LoRA: {name}={value!r} is not allowed: {' or '.join(known)}",
            )
        alpha = float(self.rank) if self.alpha is None else self.alpha
        l1 = STRENGTH[self.sparsity] if self.l1 is None else self.l1
        object.__setattr__(self, "alpha", alpha)  # the numbers that act are those that are saved
        object.__setattr__(self, "l1", l1)
        for name in ("alpha", "l1", "orthogonality", "bank_lr_ratio", "dropout"):
            require_finite("S2LoRA", **{name: getattr(self, name)})
        require(alpha != 0, "S2LoRA: alpha=0 is not allowed: the update would always be zero")
        for name in ("l1", "orthogonality", "bank_lr_ratio"):
            require(getattr(self, name) >= 0, f"S2LoRA: {name}={getattr(self, name)} is below 0")
        require(0 <= self.dropout < 1, f"S2LoRA: dropout={self.dropout!r} is not in [0, 1)")
        require_duration("S2LoRA", "warmup", self.warmup)
        self._check_kept()

    def _check_kept(self) -> None:
        plain = isinstance(self.kept, Mapping)
        require(plain, f"S2LoRA: kept={self.kept!r} is not allowed: site -> number")
        object.__setattr__(self, "kept", dict(self.kept))
        for site, number in self.kept.items():
            require_rank(f"S2LoRA, kept at {site}", number)
            require(
                number <= self.rank,
                f"S2LoRA: kept={number} at {site} is more than rank={self.rank}",
            )

    @property
    def scale(self) -> float:
        """s = alpha / rank."""
        assert self.alpha is not None, "set by __post_init__"
        return self.alpha / self.rank

    @property
    def strength(self) -> float:
        """`l1` as it acts."""
        assert self.l1 is not None, "set by __post_init__"
        return self.l1

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse sites whose shapes cannot share as asked."""
        self.bank_shapes(sites)
        other = sorted({site.name for site in sites} ^ set(self.kept)) if self.kept else []
        require(not other, f"S2LoRA: kept and the sites do not both have {''.join(other[:1])}")

    def renamed(self, names: Mapping[Site, str]) -> S2LoRA:
        """`kept` by the sites' new names."""
        new = {site.name: name for site, name in names.items()}
        return self.replace(kept={new[site]: number for site, number in self.kept.items()})

    def least_numbers(self, site: Site) -> int | None:
        """Its coefficients: the matrices are the bank's."""
        return self.kept.get(site.name, self.rank)

    def bank_shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, int]]:
        """Name -> shape of every shared matrix, in the order of the sites."""
        shapes: dict[str, tuple[int, int]] = {}
        for site in sites:
            weight = None if site.parameter is None else torch.empty(0)
            d_out, d_in = require_matrix("S2LoRA", site, weight)
            require_rank("S2LoRA", self.rank, site)
            first = sites[0]
            if self.share == "attn" and site.shape != first.shape:
                raise AdaptError(
                    f"S2LoRA: share='attn' is one pair of one shape, but {site.name} is"
                    f" {list(site.shape)} and {first.name} {list(first.shape)}: choose sites of one"
                    " shape, or share='dim' (a matrix per side) or 'shape' (a pair per shape)"
                )
            a, b = self._names(site)
            shapes |= {a: (self.rank, d_in), b: (d_out, self.rank)}
        return shapes

    def _names(self, site: Site) -> tuple[str, str]:
        """What the site's A and B are called in the bank."""
        d_out, d_in = site.shape
        if self.share == "shape":
            return f"A_{d_out}x{d_in}", f"B_{d_out}x{d_in}"
        return f"A_{d_in}", f"B_{d_out}"

    def build_bank(self, sites: Sequence[Site], generator: Generator | None) -> nn.Module | None:
        """The shared matrices, drawn in fp32 on the CPU."""
        shapes = self.bank_shapes(sites)
        return SharedFactors({n: self._start(n, s, generator) for n, s in shapes.items()})

    def _start(self, name: str, shape: tuple[int, int], generator: Generator | None) -> Tensor:
        factor = torch.zeros(shape, dtype=torch.float32, device="cpu")
        if self.init == "adalora":
            factor.normal_(std=INIT_STD, generator=generator)
        elif name.startswith("A"):
            bound = shape[1] ** -0.5
            factor.uniform_(-bound, bound, generator=generator)
        return factor

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        """The coefficients at one site."""
        require(
            self.dropout == 0 or site.slot == "output",
            f"S2LoRA: dropout={self.dropout} cannot act on {site.name}: {site.why}, so the"
            " adapter never sees an input; set dropout=0",
        )
        number = self.kept.get(site.name, self.rank)
        start = 0.0 if self.init == "adalora" else 1.0
        lam = torch.full((number,), start, dtype=torch.float32, device="cpu")
        index = torch.arange(number, dtype=torch.int16, device="cpu") if self.kept else None
        return S2LoRAAdapter(lam, self._names(site), self.scale, self.dropout, index)

    def check_state(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """A compact file names ranks of the bank, each once."""
        for key in (f"{site}/index" for site in self.kept):
            index = state[key].long()
            inside = bool(((index >= 0) & (index < self.rank)).all())
            require(
                inside and len(index.unique()) == len(index),
                f"S2LoRA: {key!r} does not name different ranks from 0 to {self.rank - 1}",
            )

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor:
        """`orthogonality` R, and l1 / (M r) sum |lam| where the loss makes coefficients sparse."""
        bank, total = bank_of(adapters), torch.zeros(())
        if bank is not None and self.orthogonality:
            departures = [_departure(n, p) for n, p in bank.named_parameters()]
            total = total + self.orthogonality * torch.stack(departures).mean()
        if self.sparsity == "loss" and adapters:
            lam = torch.cat([cast("S2LoRAAdapter", a).lam for a in adapters.values()])
            total = total + self.strength * lam.abs().mean()
        return total

    def parameter_groups(
        self, adapters: Mapping[str, Adapter], lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """lam at lr, with what `proximal_step` needs; the bank at lr `bank_lr_ratio`."""
        bank = bank_of(adapters)
        own = [p for adapter in adapters.values() for p in adapter.parameters()]
        shared = [] if bank is None else list(bank.parameters())
        sparse = {"params": _trained(own), "lr": lr, "weight_decay": 0.0}
        if self.sparsity == "proximal":
            sparse = sparse_group(sparse, self.strength, self.warmup)
        rate = lr * self.bank_lr_ratio
        dense = {"params": _trained(shared), "lr": rate, "weight_decay": 0.0}
        return [group for group in (sparse, dense) if group["params"]]


def _trained(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def _departure(name: str, factor: Tensor) -> Tensor:
    """||A A^T - I||_F^2 or ||B^T B - I||_F^2."""
    return gram_error(factor if name.startswith("A") else factor.t()).square().sum()
