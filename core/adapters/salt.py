"""SALT: scale and shift of the largest singular values, a low-rank block on the rest.

Source: arXiv 2503.16055 and its authors' code, both known through notes. The paper fixes the split
of the spectrum, a, b, X, Y, the relu on the whole middle matrix and the norms of the regulariser;
its code the three starts. Ours: the clamp of the scaled values alone as the default (an update of
low rank then, and no d x d product), the start at the frozen backbone as the default, the rank of
the block per site, and what the file holds. Results say nothing of the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self, TypeVar, cast, get_args

import torch
from torch import Generator, Tensor, nn

from ..errors import AdaptError
from ..patterns import parse
from ..precision import widened, without_autocast
from ..recipe import Adapter, Recipe, require, require_finite, require_rank
from ..spectral import Spectrum, check_marks, spectrum_at
from .lora import (
    at_site,
    check_fitting,
    fitted,
    require_matrix,
    with_branch,
)

if TYPE_CHECKING:
    from ..layers import FrozenLayer
    from ..sites import Site

Clamp = Literal["diagonal", "full", "none"]
Init = Literal["kaiming", "gaussian", "paper"]
Vectors = Literal["recomputed", "stored"]
Value = TypeVar("Value", int, int | float)
Block = tuple[Tensor, Tensor]  # X [m, q], Y [q, m]
INIT_STD = 0.01
NEGATIVE_SLOPE_SQUARED = 20  # of the leaky relu that the Kaiming start is for


class SpectralAdapter(Adapter):
    """W' = W + U_r diag(g) V_r^T + U_m N V_m^T with g = clamp(a s_r + b) - s_r and N = X Y.

    r = `top` leading singular values, the other m = k - r coupled by the `block`; either may be
    none. Under the full clamp N = relu(diag(s_m) + X Y) - diag(s_m).
    """

    a: Tensor  # this and b are None where r = 0
    b: Tensor
    X: Tensor  # this and Y are None where r = k
    Y: Tensor
    U: Tensor
    s: Tensor
    V: Tensor

    def __init__(
        self, spectrum: Spectrum, top: int, block: Block | None, clamp: Clamp, stored: bool
    ) -> None:
        super().__init__()
        self.top, self.clamp = top, clamp
        ones = torch.ones(top, dtype=torch.float32, device="cpu")
        own = {"a": ones, "b": torch.zeros_like(ones)} if top else {}
        own |= dict(zip("XY", block, strict=True)) if block else {}
        for name in ("a", "b", "X", "Y"):
            self.register_parameter(name, nn.Parameter(own[name]) if name in own else None)
        for name in ("U", "s", "V"):
            vectors: Tensor = getattr(spectrum, name)
            # Not those that other sets hold, too: a file's are copied into them.
            self.register_buffer(name, vectors.clone() if stored else vectors, persistent=stored)
        self.register_buffer("mark", None if stored else spectrum.mark())

    def scaled(self) -> Tensor:
        """a s_r + b [r], not clamped."""
        return self.a * self.s[: self.top] + self.b

    def product(self) -> Tensor:
        """X Y [m, m]."""
        return self.X @ self.Y

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(A, B) with W' = W + the sum of B A: of the scaled values, and of the block."""
        with without_autocast(self.U):
            found = [self._scaled_pair()] if self.top else []
            return [*found, self._block_pair()] if self.top < len(self.s) else found

    def _scaled_pair(self) -> tuple[Tensor, Tensor]:
        values, start = self.scaled(), self.s[: self.top]
        values = values if self.clamp == "none" else values.relu()
        return self.V[:, : self.top].mT, self.U[:, : self.top] * (values - start)

    def _block_pair(self) -> tuple[Tensor, Tensor]:
        u, s, v = self.U[:, self.top :], self.s[self.top :], self.V[:, self.top :]
        if self.clamp == "full":
            start = s.diag()
            return v.mT, u @ ((start + self.product()).relu() - start)
        if len(self.Y) > len(s):  # the inner rank is more than the block can have
            return v.mT, u @ self.product()
        return self.Y @ v.mT, u @ self.X

    def factors(self) -> tuple[Tensor, Tensor, None, float]:
        """(A, B, None, 1) of both parts, of rank r + min(q, m); of rank k under the full clamp."""
        a, b = zip(*self.pairs(), strict=True)
        return torch.cat(a), torch.cat(b, dim=1), None, 1.0

    def weight(self, w: Tensor) -> Tensor:
        """W [d_out, d_in] + B A of both parts, added in fp32 (fp64 for an fp64 weight)."""
        new = w
        for a, b in self.pairs():
            new = widened(new, a, b, 1.0)
        return new.to(w.dtype)

    def departure(self) -> Tensor:
        """||a s_r + b - s_r||_2 + ||X Y||_F: norms, not their squares."""
        with without_autocast(self.U):
            parts = [self.scaled() - self.s[: self.top]] if self.top else []
            parts += [self.product()] if self.top < len(self.s) else []
        return torch.stack([torch.linalg.vector_norm(part) for part in parts]).sum()

    def extra_repr(self) -> str:
        return f"top={self.top} of {len(self.s)}, clamp={self.clamp}"


class ThinSpectralAdapter(SpectralAdapter):
    """The same where the branch costs a token less than the layer does."""

    def output(self, x: Tensor, y: Tensor, layer: FrozenLayer) -> Tensor:
        """y + B (A x), the factors in x's dtype, the result in y's."""
        a, b, _, _ = self.factors()
        return with_branch(x, y, layer, a, b, 1.0)


def spectral(
    spectrum: Spectrum, top: int, block: Block | None, clamp: Clamp, vectors: Vectors
) -> SpectralAdapter:
    """The adapter whose forms are worth having: a wide update acts on the weight alone."""
    (d_out, k), d_in = spectrum.U.shape, len(spectrum.V)
    rest = 0 if block is None else k - top if clamp == "full" else min(len(block[1]), k - top)
    thin = (top + rest) * (d_out + d_in) <= d_out * d_in
    made = ThinSpectralAdapter if thin else SpectralAdapter
    return made(spectrum, top, block, clamp, vectors == "stored")


@dataclass(frozen=True, kw_only=True)
class SALT(Recipe):
    """W' = U clamp(M) V^T with W0 = U diag(s) V^T, k = min(d_out, d_in) (arXiv 2503.16055).

    M = diag(a s_r + b) on the r largest singular values, diag(s_m) + X Y on the other m = k - r:
    a [r] = 1, b [r] = 0, X [m, q], Y [q, m]; no a, b where r = 0, no X, Y where r = k.
    `top`: r as a whole number, or as a share of k: max(1, floor(k top)). `rank`: q, which may
    exceed m. `tops`, `ranks`: site pattern -> the same there. 2 r + 2 q (k - r) numbers train: a
    larger r means fewer.
    `clamp`: `diagonal`, relu on a s + b alone; `full`, the paper's relu on all of M, under which
    couplings are never negative, X Y is dense and, from Y = 0, only its diagonal gets gradients;
    `none`. `init`: Y = 0 and X uniform within sqrt(2 / (7 q)) (`kaiming`) or normal with deviation
    0.01 (`gaussian`): the frozen backbone; or both normal (`paper`): near it.
    `regularisation`: this times the sum of ||a s_r + b - s_r||_2 + ||X Y||_F of all sites
    is added to the loss.

    The update has rank r + min(q, m). Where (r + min(q, m)) (d_out + d_in) <= d_out d_in it acts on
    what the layer returns, y + B (A x); elsewhere, and under the full clamp, on the weight.

    `vectors`: U and V are computed from W0, in fp64 on the CPU, when a set is attached or loaded;
    X Y is meant in that basis. A file holds 4 (2 r + 2 q m + k) bytes a site (`recomputed`), k of
    them a mark of the vectors: where another LAPACK finds others the file is refused, and sites
    whose singular values are equal up to rounding are refused at once. Or it holds U, s, V, too:
    4 (2 r + 2 q m + k (d_out + d_in + 1)) bytes (`stored`), which needs no such care.

    Raises `AdaptError` for settings out of range, for sites without a weight matrix, and for an r
    or q that does not fit.

    >>> from polyadapt.core import attach
    >>> _ = torch.manual_seed(0)
    >>> attach(nn.Sequential(nn.Linear(8, 6)), SALT(top=2, rank=3), at="0").trainable_count()
    28
    """

    top: int | float = 0.1
    rank: int = 4
    clamp: Clamp = "diagonal"
    init: Init = "kaiming"
    tops: Mapping[str, int | float] = field(default_factory=dict, hash=False)
    ranks: Mapping[str, int] = field(default_factory=dict, hash=False)
    regularisation: float = 0.0
    vectors: Vectors = "recomputed"

    def __post_init__(self) -> None:
        for setting in ("tops", "ranks"):
            given = getattr(self, setting)
            plain = isinstance(given, Mapping)
            require(plain, f"SALT: {setting}={given!r} is not allowed: site pattern -> number")
            object.__setattr__(self, setting, dict(given))
            for pattern in given:
                parse(pattern)
        for top in (self.top, *self.tops.values()):
            _require_top(top)
        for rank in (self.rank, *self.ranks.values()):
            require_rank("SALT", rank)
        for name, allowed in (("clamp", Clamp), ("init", Init), ("vectors", Vectors)):
            require_choice("SALT", name, getattr(self, name), get_args(allowed))
        require_finite("SALT", regularisation=self.regularisation)
        require(self.regularisation >= 0, f"SALT: regularisation={self.regularisation} is below 0")

    @property
    def identity(self) -> bool:
        """Not with the paper's start."""
        return self.init != "paper"

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse a pattern of `tops` or `ranks` that no site fits."""
        check_fitting("SALT", "tops", self.tops, sites)
        check_fitting("SALT", "ranks", self.ranks, sites)

    def renamed(self, names: Mapping[Site, str]) -> Self:
        """`tops` and `ranks` by the new names of the sites that their patterns fit."""
        return self.replace(tops=_renamed(self.tops, names), ranks=_renamed(self.ranks, names))

    def sizes_at(self, site: Site) -> tuple[int, int]:
        """(r, q) there."""
        k = min(site.shape)
        top = at_site("SALT", "tops", self.tops, site, self.top)
        r = top if isinstance(top, int) else max(1, math.floor(k * top))
        require(
            r <= k,
            f"SALT: top={r} does not fit {site.name}: its weight is {list(site.shape)}, so at most"
            f" {k}",
        )
        q = at_site("SALT", "ranks", self.ranks, site, self.rank)
        require_rank("SALT", q, site)
        return r, q

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        """The numbers at one site, drawn in fp32 on the CPU, and the decomposition of W0."""
        require_matrix("SALT", site, weight)
        assert weight is not None, "refused above"
        r, q = self.sizes_at(site)
        spectrum = spectrum_at("SALT", site, weight, stored=self.vectors == "stored")
        m = min(site.shape) - r
        block = self._block(m, q, generator) if m else None
        return spectral(spectrum, r, block, self.clamp, self.vectors)

    def _block(self, m: int, q: int, generator: Generator | None) -> Block:
        x = torch.empty(m, q, dtype=torch.float32, device="cpu")
        y = torch.zeros(q, m, dtype=torch.float32, device="cpu")
        if self.init == "kaiming":
            bound = math.sqrt(6 / ((1 + NEGATIVE_SLOPE_SQUARED) * q))
            x.uniform_(-bound, bound, generator=generator)
        else:
            x.normal_(std=INIT_STD, generator=generator)
        if self.init == "paper":
            y.normal_(std=INIT_STD, generator=generator)
        return x, y

    def least_numbers(self, site: Site) -> int | None:
        """a, b, X, Y, U, s and V; a set whose vectors are not in the file needs its backbone."""
        r, q = self.sizes_at(site)
        return 2 * r + 2 * q * (min(site.shape) - r) + stored_vectors("SALT", site, self.vectors)

    def check_state(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Refuse numbers of another basis."""
        check_marks(state, own)

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor:
        """`regularisation` times the sum of the departures."""
        if not self.regularisation or not adapters:
            return torch.zeros(())
        terms = [cast("SpectralAdapter", a).departure() for a in adapters.values()]
        return self.regularisation * torch.stack(terms).sum()


def stored_vectors(method: str, site: Site, vectors: Vectors) -> int:
    """How many numbers of U, s and V a file holds; without them it is no use alone."""
    if vectors == "recomputed":
        raise AdaptError(
            f"{method}: the update at {site.name} is in the basis of its frozen weight, which the"
            " file does not hold: load it onto its backbone, or make it with vectors='stored'"
        )
    return min(site.shape) * (1 + sum(site.shape))


def require_choice(method: str, name: str, value: object, allowed: Sequence[str]) -> None:
    """A word of a few."""
    require(
        isinstance(value, str) and value in allowed,
        f"{method}: {name}={value!r} is not allowed: {' or '.join(allowed)}",
    )


def _require_top(top: object) -> None:
    whole = isinstance(top, int) and not isinstance(top, bool) and top >= 0
    share = isinstance(top, float) and 0 < top <= 1
    require(
        whole or share,
        f"SALT: top={top!r} is not allowed: a whole number from 0, or a share up to 1.0",
    )


def _renamed(by_pattern: Mapping[str, Value], names: Mapping[Site, str]) -> dict[str, Value]:
    return {name: value for p, value in by_pattern.items() for name in fitted(p, names)}
