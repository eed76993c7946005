"""How the updates that several sets have at one site become one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import AdaptError
from .low_rank import Lost, Update, best_of_rank, dare, exact_sum, own_generator, recompressed, ties
from .precision import without_autocast
from .recipe import require, require_rank
from .sites import Site

Method = Literal["exact", "svd", "ties", "dare"]


@dataclass(frozen=True)
class Rule:
    """How the updates of one site become one."""

    method: Method = "exact"
    rank: int | None = None
    density: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        what = f"combine by {self.method!r}"
        allowed = get_args(Method)
        require(self.method in allowed, f"{what} is not known: {' or '.join(allowed)}")
        if self.method == "exact":
            require(self.rank is None, f"{what} keeps the sum of the ranks: rank needs 'svd'")
        else:
            require(self.rank is not None, f"{what} needs a rank, such as that of the sets")
            require_rank(what, self.rank)
        if self.method in ("exact", "svd"):
            require(self.density is None, f"{what} takes no density: 'ties' and 'dare' do")
        else:
            good = is_number(self.density) and 0 < float(self.density or 0) <= 1
            require(good, f"{what}: density={self.density!r} is not in (0, 1]; 0.2 is usual")
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        require(whole, f"{what}: seed={self.seed!r} is not a whole number")

    def at(self, site: Site, updates: Sequence[Update | None]) -> tuple[Update, Lost]:
        """One update for the weighted ones of a site, one per set (None: not there)."""
        here = [u for u in updates if u is not None]
        with without_autocast(here[0].A):
            if self.method == "exact":
                return exact_sum(here), Lost()
            assert self.rank is not None, "checked above"
            rank = min(self.rank, *site.shape)
            if not self.sparse:
                return recompressed(exact_sum(here), rank)
            return best_of_rank(self._dense(site, updates), rank)

    @property
    def sparse(self) -> bool:
        """Works on dense updates; DARE that drops nothing is the plain sum."""
        return self.method == "ties" or (self.method == "dare" and self.density != 1)

    def _dense(self, site: Site, updates: Sequence[Update | None]) -> Tensor:
        assert self.density is not None, "checked above"
        dense = {place: u.dense() for place, u in enumerate(updates) if u is not None}
        if self.method == "ties":
            return ties(list(dense.values()), self.density)
        thinned = (
            dare(delta, self.density, own_generator(self.seed, site.name, place))
            for place, delta in dense.items()
        )
        return torch.stack(list(thinned)).sum(0)

    def copies(self, weights: Sequence[float]) -> bool:
        """One set at weight 1 is itself; `weights` are those that are not 0."""
        require(bool(weights), "combine: every weight is 0, so nothing is left")
        return self.method == "exact" and list(weights) == [1]

    def check(self, updates: Mapping[Site, Sequence[Update | None]]) -> None:
        """A rank that no site can have is a mistake."""
        most = max(self._bound(site, found) for site, found in updates.items())
        if self.rank is not None and self.rank > most:
            raise AdaptError(
                f"combine by {self.method!r}: rank {self.rank} is more than the result can have:"
                f" at most {most}"
            )

    def _bound(self, site: Site, updates: Sequence[Update | None]) -> int:
        ranks = sum(u.rank for u in updates if u is not None)
        return min(site.shape) if self.sparse else min(ranks, *site.shape)


def is_number(value: object) -> bool:
    """A finite int or float."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]
