"""S-SAM: scale and shift of every singular value (arXiv 2408.06447).

Written from notes on the paper and on its authors' code, and on that of SALT, which is built on it.
Ours: what the file holds, and no trained part of the spectrum smaller than the whole; in the
authors' code such a part shifts the frozen rest by one. Results say nothing of the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, get_args

import torch
from torch import Generator, Tensor

from ..recipe import Adapter, Recipe, require, require_finite
from ..spectral import check_marks, spectrum_at
from .lora import require_matrix
from .salt import SpectralAdapter, Vectors, require_choice, spectral, stored_vectors

if TYPE_CHECKING:
    from ..sites import Site


@dataclass(frozen=True, kw_only=True)
class SSAM(Recipe):
    """W' = U relu(diag(a s + b)) V^T with W0 = U diag(s) V^T, a [k] = 1, b [k] = 0 (2408.06447).

    k = min(d_out, d_in). It is SALT with r = k, but for the regulariser: `regularisation` times the
    sum of ||1 - a||_2 + ||b||_2 of all sites is added to the loss. The update has rank k, so it
    acts on the weight. `vectors` as in `SALT`: a file holds 12 k bytes a site, or
    4 k (d_out + d_in + 3).
    Raises `AdaptError` as `SALT` does.

    >>> from torch import nn
    >>> from polyadapt.core import attach
    >>> _ = torch.manual_seed(0)
    >>> attach(nn.Sequential(nn.Linear(8, 6)), SSAM(), at="0").trainable_count()
    12
    """

    regularisation: float = 0.0
    vectors: Vectors = "recomputed"

    def __post_init__(self) -> None:
        require_choice("SSAM", "vectors", self.vectors, get_args(Vectors))
        require_finite("SSAM", regularisation=self.regularisation)
        require(self.regularisation >= 0, f"SSAM: regularisation={self.regularisation} is below 0")

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        """a and b at one site, and the decomposition of W0."""
        require_matrix("SSAM", site, weight)
        assert weight is not None, "refused above"
        spectrum = spectrum_at("SSAM", site, weight, stored=self.vectors == "stored")
        return spectral(spectrum, min(site.shape), None, "diagonal", self.vectors)

    def least_numbers(self, site: Site) -> int | None:
        """a, b, U, s and V; a set whose vectors are not in the file needs its backbone."""
        return 2 * min(site.shape) + stored_vectors("SSAM", site, self.vectors)

    def check_state(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Refuse numbers of another basis."""
        check_marks(state, own)

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor:
        """`regularisation` times the sum of ||1 - a|| + ||b||: norms, not their squares."""
        if not self.regularisation or not adapters:
            return torch.zeros(())
        terms = [_departure(cast("SpectralAdapter", a)) for a in adapters.values()]
        return self.regularisation * torch.stack(terms).sum()


def _departure(adapter: SpectralAdapter) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(1 - adapter.a) + torch.linalg.vector_norm(adapter.b)
    return norms
