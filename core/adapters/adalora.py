"""AdaLoRA: singular triplets that compete, over all sites, for a shrinking budget of ranks.

Source: arXiv 2303.10512 and its authors' code, which we follow where the two differ (the penalty is
a mean of norms; the schedule counts from t_init). The paper was read as its abstract only.
Ours: the budget is exact (ties fall to the later triplet, none is pruned beyond it), the scale is
alpha / r0 without the code's 1e-5, E does not decay, and t_init and t_final may be shares of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..errors import AdaptError
from ..precision import widened, without_autocast
from ..recipe import (
    Adapter,
    Recipe,
    require,
    require_duration,
    require_finite,
    require_rank,
    steps_of,
)
from ..sites import Site
from .lora import Pair, PairAdapter, require_matrix, with_branch

if TYPE_CHECKING:
    from ..layers import FrozenLayer

INIT_STD = 0.02


@dataclass(frozen=True)
class Budget:
    """How many triplets live at a step: `first` up to `start`, `last` from `end` on, all whole.

    >>> [Budget(24, 16, 10, 80).at(step) for step in (10, 20, 50, 80, 99)]
    [24, 21, 16, 16, 16]
    """

    first: int
    last: int
    start: int
    end: int

    def at(self, step: int) -> int:
        """floor(last + (first - last) (1 - (step - start) / (end - start))^3) between the two."""
        if step <= self.start:
            return self.first
        left = max(0, self.end - step)
        return self.last + (self.first - self.last) * left**3 // (self.end - self.start) ** 3


class AdaLoRAAdapter(PairAdapter):
    """W' = W + s B diag(E) A with A [r0, d_in], E [r0], B [d_out, r0]: r0 triplets."""

    sensitivity: Tensor | None
    uncertainty: Tensor | None

    def __init__(self, pair: Pair, scored: bool) -> None:
        super().__init__(pair)
        rank = len(pair.A)
        self.E = nn.Parameter(pair.A.new_zeros(rank))
        # A row per triplet: its numbers of A, of E and of B side by side.
        zeros = pair.A.new_zeros(rank, sum((pair.A.shape[1], 1, pair.B.shape[0])))
        self.register_buffer("sensitivity", zeros if scored else None)
        self.register_buffer("uncertainty", zeros.clone() if scored else None)

    def factors(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """(A, B, E, s)."""
        return self.A, self.B, self.E, self.scale

    def weight(self, w: Tensor) -> Tensor:
        """W [d_out, d_in] + s B diag(E) A, added in fp32 (fp64 for an fp64 weight)."""
        return widened(w, self.E[:, None] * self.A, self.B, self.scale).to(w.dtype)

    def output(self, x: Tensor, y: Tensor, layer: FrozenLayer) -> Tensor:
        """y + s B diag(E) A drop(x), the factors in x's dtype, the result in y's."""
        if self.drops(x):
            x = F.dropout(x, self.dropout)
        return with_branch(x, y, layer, self.A, self.B, self.scale, self.E)

    def departures(self) -> tuple[Tensor, Tensor]:
        """||A A^T - I||_F and ||B^T B - I||_F."""
        a, b = gram_error(self.A), gram_error(self.B.t())
        return torch.linalg.matrix_norm(a), torch.linalg.matrix_norm(b)

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Update the moving means of I = |w dL/dw| and of |I - mean|; a missing gradient is 0."""
        assert self.sensitivity is not None, "scored"
        assert self.uncertainty is not None, "scored"
        grads = [
            torch.zeros_like(p) if p.grad is None else p.grad for p in (self.A, self.E, self.B)
        ]
        importance = (_rows(self.A, self.E, self.B) * _rows(*grads)).abs()
        self.sensitivity.mul_(beta1).add_(importance, alpha=1 - beta1)
        distance = (importance - self.sensitivity).abs_()
        self.uncertainty.mul_(beta2).add_(distance, alpha=1 - beta2)

    def scores(self) -> Tensor:
        """Per triplet s(E_i) + mean s(A_i) + mean s(B_i), s = sensitivity * uncertainty."""
        assert self.sensitivity is not None, "scored"
        assert self.uncertainty is not None, "scored"
        sizes = [self.A.shape[1], 1, self.B.shape[0]]
        parts = (self.sensitivity * self.uncertainty).split(sizes, dim=1)
        return torch.stack([part.mean(1) for part in parts]).sum(0)

    def rank(self) -> int:
        """Triplets that contribute."""
        return int(self.E.count_nonzero())

    def deployed(self) -> Adapter:
        """The same triplets without the moving means."""
        own = Pair(self.A.detach(), self.B.detach(), self.scale, self.dropout, self.embedding)
        plain = AdaLoRAAdapter(own, scored=False)
        plain.E.data = self.E.detach()
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return f"live={self.rank()}, {super().extra_repr()}"


def gram_error(rows: Tensor) -> Tensor:
    """M M^T - I for M [r, d]: zero when the rows are orthonormal."""
    with without_autocast(rows):
        return rows @ rows.t() - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)


def _rows(a: Tensor, e: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, e[:, None], b.t()], dim=1)


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Recipe):
    """W' = W0 + s B diag(E) A, s = alpha / r0, with E = 0 and A, B normal (std 0.02) at the start.

    Every site starts with r0 = `initial_rank` triplets (1.5 `rank`, rounded up, unless given), the
    set ends with `rank` per site on average: after each optimiser step the triplets of all M sites
    are scored, and E_i = 0 for all but the best b(t). b(t) is M r0 up to step t_init, then falls as
    a cubic to M `rank` at T - t_final, where scores and choice are frozen; in between the choice is
    made every `every` steps, and E_i that was set to 0 may come back. `t_init` and `t_final` are
    steps when whole and shares of the T steps when fractions. The scale keeps r0 after pruning, and
    `alpha` is r0 unless given.
    Score: s(E_i) + mean_j s(A_ij) + mean_j s(B_ji), s(w) = I' U' with I = |w dL/dw| and the moving
    means I' <- beta1 I' + (1 - beta1) I and U' <- beta2 U' + (1 - beta2) |I - I'|.
    Loss: + `orthogonality` times the mean of all ||A A^T - I||_F and ||B^T B - I||_F, or times the
    sum of their squares when `squared` (the paper).

    The loop must call `after_step(step, total)` between optimiser.step and zero_grad, as
    `AdaptedModule` does. I' and U' are part of `state_dict`, so a resumed run chooses alike.
    The file leaves them out and keeps all r0 triplets: pruned ones add exact zeros, and without
    them sums would round differently. It loads with `allocate=False`, under which no choice is
    made and no mean is kept. `live_ranks.as_lora` makes the smaller, plain LoRA.

    Raises `AdaptError` for settings out of range, sites without a weight matrix, an initial rank
    that does not fit, and from `after_step` when T or the gradients are missing.

    >>> recipe = AdaLoRA(rank=8, alpha=24)
    >>> recipe.initial_rank, recipe.scale, recipe.budget(sites=2, total=100).at(20)
    (12, 2.0, 20)
    """

    rank: int = 8
    initial_rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    t_init: int | float = 0.1
    t_final: int | float = 0.3
    every: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1
    squared: bool = False
    allocate: bool = True

    def __post_init__(self) -> None:
        require_rank("AdaLoRA", self.rank)
        initial = (3 * self.rank + 1) // 2 if self.initial_rank is None else self.initial_rank
        require_rank("AdaLoRA", initial)
        require(
            initial >= self.rank,
            f"AdaLoRA: initial_rank={initial} is below rank={self.rank}: ranks only shrink",
        )
        alpha = float(initial) if self.alpha is None else self.alpha
        object.__setattr__(self, "initial_rank", initial)
        object.__setattr__(self, "alpha", alpha)
        require_finite("AdaLoRA", alpha=alpha, orthogonality=self.orthogonality)
        require(alpha != 0, "AdaLoRA: alpha=0 is not allowed: the update would always be zero")
        require(self.orthogonality >= 0, f"AdaLoRA: orthogonality={self.orthogonality} is below 0")
        for name in ("dropout", "beta1", "beta2"):
            value = getattr(self, name)
            require_finite("AdaLoRA", **{name: value})
            require(0 <= value < 1, f"AdaLoRA: {name}={value!r} is not in [0, 1)")
        for name in ("t_init", "t_final"):
            require_duration("AdaLoRA", name, getattr(self, name))
        whole = isinstance(self.every, int) and not isinstance(self.every, bool)
        require(
            whole and self.every >= 1,
            f"AdaLoRA: every={self.every!r} is not allowed: a whole number from 1",
        )

    def least_numbers(self, site: Site) -> int | None:
        """The triplets that every site starts with."""
        return self.r0 * sum(site.shape)

    @property
    def r0(self) -> int:
        """Triplets of every site at the start."""
        assert self.initial_rank is not None, "set by __post_init__"
        return self.initial_rank

    @property
    def scale(self) -> float:
        """alpha / r0, before and after pruning."""
        assert self.alpha is not None, "set by __post_init__"
        return self.alpha / self.r0

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        """The triplets at one site, drawn in fp32 on the CPU."""
        d_out, d_in = require_matrix("AdaLoRA", site, weight)
        require_rank("AdaLoRA", self.r0, site)
        require(
            self.dropout == 0 or site.slot == "output",
            f"AdaLoRA: dropout={self.dropout} cannot act on {site.name}: {site.why}, so the"
            " adapter never sees an input; set dropout=0",
        )
        a = torch.empty(self.r0, d_in, dtype=torch.float32, device="cpu")
        b = torch.empty(d_out, self.r0, dtype=torch.float32, device="cpu")
        for factor in (a, b):
            factor.normal_(std=INIT_STD, generator=generator)
        pair = Pair(a, b, self.scale, self.dropout, site.kind == "embedding")
        return AdaLoRAAdapter(pair, scored=self.allocate)

    def deployed(self) -> AdaLoRA:
        """The same without allocation."""
        return self.replace(allocate=False)

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor:
        """`orthogonality` times the mean of the departures from I, or the sum of their squares."""
        found = [t for a in adapters.values() for t in cast("AdaLoRAAdapter", a).departures()]
        if not found or self.orthogonality == 0:
            return torch.zeros(())
        departures = torch.stack(found)
        total = departures.square().sum() if self.squared else departures.mean()
        return self.orthogonality * total

    def budget(self, sites: int, total: int) -> Budget:
        """The schedule of a run of `total` steps; one without a middle phase is refused."""
        start, final = steps_of(self.t_init, total), steps_of(self.t_final, total)
        require(
            start < total - final,
            f"AdaLoRA: t_init={self.t_init} and t_final={self.t_final} leave none of {total} steps"
            " to shrink the budget in",
        )
        return Budget(sites * self.r0, sites * self.rank, start, total - final)

    def after_step(self, adapters: Mapping[str, Adapter], step: int, total: int | None) -> None:
        """Score with this step's gradients, then set E to 0 outside of the budget."""
        if not self.allocate or not adapters:
            return
        require(total is not None, "AdaLoRA needs the number of steps: after_step(step, total)")
        assert total is not None, "just required"
        ours = [cast("AdaLoRAAdapter", adapter) for adapter in adapters.values()]
        budget = self.budget(len(ours), total)
        if step < budget.end:
            self._observe(ours, step)
        if step >= budget.end or (step > budget.start and step % self.every == 0):
            keep_best(ours, budget.at(step))

    def _observe(self, adapters: Sequence[AdaLoRAAdapter], step: int) -> None:
        if all(adapter.E.grad is None for adapter in adapters):
            raise AdaptError(
                f"AdaLoRA: no gradients at step {step}: call after_step before zero_grad"
            )
        for adapter in adapters:
            adapter.observe(self.beta1, self.beta2)


@torch.no_grad()
def keep_best(adapters: Sequence[AdaLoRAAdapter], budget: int) -> None:
    """E = 0 but for the `budget` best triplets of all adapters; of equal ones the first stay."""
    scores = torch.cat([adapter.scores() for adapter in adapters])
    if budget >= len(scores):
        return
    pruned = scores.sort(descending=True, stable=True).indices[budget:]
    dead = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, pruned, True)
    for adapter, own in zip(adapters, dead.split([len(a.E) for a in adapters]), strict=True):
        adapter.E.masked_fill_(own, 0)
