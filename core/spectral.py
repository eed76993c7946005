"""The singular value decomposition of a frozen weight: signed, shared, and known again when it is.

W0 = U diag(s) V^T. A method that stores numbers in the basis of U and V needs the very same vectors
when its file is read, on whatever machine. Singular vectors are defined up to a joint sign, and
where singular values are equal up to a rotation. So they are computed in fp64 on the CPU whatever
W0 and its device are, which puts the rounding of any LAPACK far below fp32; a convention fixes the
signs; vectors that another LAPACK could not find again are refused; and a `mark`, one number for
each pair of vectors, is stored and compared when a file is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from .errors import AdaptError
from .fingerprint import digest

if TYPE_CHECKING:
    from .sites import Site

MARK = "mark"
# Two LAPACKs differ by about 2e-16 s_1 / gap in a vector: by 1e-6 at this gap, and 1e-9 is usual.
SMALLEST_GAP = 1e-9
# A mark is about 1; fp32 vectors give it to 1e-6, and any other vector is far from it.
MARK_TOLERANCE = 1e-5
# Entries that are equal up to rounding, as in (1, -1) / sqrt(2), must not let it choose the sign.
NEARLY = 1 - 1e-6

_shared: WeakValueDictionary[tuple[str, str, str], Tensor] = WeakValueDictionary()


@dataclass(frozen=True)
class Spectrum:
    """U [d_out, k], s [k] falling and not below 0, V [d_in, k], k = min(d_out, d_in); fp32."""

    U: Tensor
    s: Tensor
    V: Tensor

    def mark(self) -> Tensor:
        """[k], fp32: <z_U, u_i> + <z_V, v_i> with fixed z; a flip or a rotation changes it."""
        if self.s.is_meta:
            return torch.empty_like(self.s)
        u, v = (vectors.to("cpu", torch.float64) for vectors in (self.U, self.V))
        return (_phases(len(u)).cos() @ u + _phases(len(v)).sin() @ v).to(self.s)


def decomposed(weight: Tensor, *, repeatable: bool = True) -> Spectrum:
    """The decomposition of W0 [d_out, d_in], on its device, with signs.

    The entry of each u_i of the largest magnitude (the first of those within 1e-6 of it) is
    positive. All who hold the decomposition of one weight hold the same tensors.
    `repeatable`: raises `AdaptError` where a gap s_i - s_(i+1), or the smallest s_i itself, is
    below 1e-9 s_1: other machines would find other vectors. Raises it for NaN and infinity, too.

    >>> found = decomposed(torch.tensor([[8.0, -3.0], [6.0, 4.0]]))
    >>> found.s.tolist(), (10 * found.U).round().tolist()
    ([10.0, 5.0], [[8.0, -6.0], [6.0, 8.0]])
    """
    if weight.is_meta:
        (d_out, d_in), k = weight.shape, min(weight.shape)
        shapes = (d_out, k), (k,), (d_in, k)
        return Spectrum(*(torch.empty(n, dtype=torch.float32, device="meta") for n in shapes))
    if not repeatable:
        return _decomposition(weight, repeatable)
    key = digest(weight), str(weight.device)
    u, s, v = (_shared.get((*key, name)) for name in "UsV")
    if u is not None and s is not None and v is not None:
        return Spectrum(u, s, v)
    made = _decomposition(weight, repeatable)
    _shared.update({(*key, name): getattr(made, name) for name in "UsV"})
    return made


@torch.inference_mode(False)  # what is kept is used in training, too
@torch.no_grad()
def _decomposition(weight: Tensor, repeatable: bool) -> Spectrum:
    wide = weight.detach().to("cpu", torch.float64, copy=True)
    if not bool(wide.isfinite().all()):
        raise AdaptError("its weight holds NaN or infinity")
    try:
        # Not from the eigenvectors of W0 W0^T, which are faster: that squares the rounding, and
        # real weights have singular values and gaps of 2e-7 s_1 (DINOv2 ViT-S/14).
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    except LinAlgError as error:
        raise AdaptError("its singular values could not be computed") from error
    if repeatable:
        _refuse_equal(s)
    signs = _signs(u)
    wide_ones = u * signs, s, vh.mT * signs
    # In one layout, whatever LAPACK's: products of the same numbers then have the same bits.
    return Spectrum(*(t.float().contiguous().to(weight.device) for t in wide_ones))


def _refuse_equal(s: Tensor) -> None:
    gaps = -torch.diff(s, append=s.new_zeros(1))
    near = (gaps <= SMALLEST_GAP * s[0]).nonzero().flatten().tolist()
    if near:
        n = near[0] + 1
        what = f"{n} and {n + 1} are equal" if n < len(s) else f"{n} is 0"
        raise AdaptError(
            f"its singular values {what} up to rounding, so their vectors are any: set"
            " vectors='stored', which keeps these in the file, or leave the site out"
        )


def _signs(u: Tensor) -> Tensor:
    """[k]: the sign of the entry of each column that the convention makes positive."""
    size = u.abs()
    first = (size >= NEARLY * size.amax(0)).int().argmax(0)  # of equal ones the first
    return u.gather(0, first[None])[0].sign()


def _phases(n: int) -> Tensor:
    """Squares of whole numbers: their cosines are scattered like random numbers, on any machine."""
    return torch.arange(1, n + 1, dtype=torch.float64, device="cpu").square()


def check_marks(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse tensors that were made in another basis than that of the set which is to have them."""
    for key, mark in state.items():
        site, _, name = key.rpartition("/")
        if name != MARK:
            continue
        apart = (mark.to(own[key]) - own[key]).abs() > MARK_TOLERANCE
        if bool(apart.any()):
            first = int(apart.int().argmax()) + 1
            raise AdaptError(
                f"{site}: singular vector {first} of its weight is not the one that the set was"
                " trained with: the weight is another (or was cast), or the vector cannot be found"
                " again here; only a set with vectors='stored' brings its own"
            )


def spectrum_at(method: str, site: Site, weight: Tensor, *, stored: bool) -> Spectrum:
    """The decomposition at a site; what it refuses is said with the method and the site."""
    try:
        return decomposed(weight, repeatable=not stored)
    except AdaptError as error:
        raise AdaptError(f"{method}: {site.name} cannot be adapted: {error}") from error
