"""Arithmetic of updates: exact sums of low-rank ones, TIES, DARE, and the best of a wanted rank."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Update:
    """B A with A [r, d_in], B [d_out, r]: a low-rank update whose scale is in B."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.A.shape[0]

    def norm(self) -> float:
        """The Frobenius norm of B A, from the small products of each factor with itself."""
        a, b = self.A.double(), self.B.double()  # squares of squares
        return float(((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0).sqrt())

    def finite(self) -> bool:
        """No number is NaN or infinite."""
        # NaN and infinity reach a sum, which is many times faster; the sum alone may overflow, too.
        return all(
            math.isfinite(float(factor.sum())) or bool(factor.isfinite().all())
            for factor in (self.A, self.B)
        )

    def dense(self) -> Tensor:
        """The update as a matrix [d_out, d_in]."""
        return self.B @ self.A


@dataclass(frozen=True)
class Lost:
    """Frobenius norms of what a wanted rank cannot hold, and of what it was asked to hold."""

    discarded: float = 0.0
    whole: float = 0.0

    @property
    def share(self) -> float:
        """The relative error; nothing of nothing is lost."""
        return self.discarded / self.whole if self.whole else 0.0


def overall(losses: Iterable[Lost]) -> Lost:
    """All sites as if they were one long vector.

    >>> overall([Lost(3.0, 6.0), Lost(4.0, 8.0)])
    Lost(discarded=5.0, whole=10.0)
    """
    losses = list(losses)
    return Lost(math.hypot(*(x.discarded for x in losses)), math.hypot(*(x.whole for x in losses)))


def folded(factors: tuple[Tensor, Tensor, Tensor | None, float], weight: float) -> Update:
    """weight * scale * B diag(p) A with everything but A in one factor, at least in fp32.

    Where p is 0 the rank is saved; one is left, as no update has none.
    """
    a, b, p, scale = factors
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    if p is not None:
        live = p.nonzero().flatten() if p.any() else torch.zeros(1, dtype=torch.long).to(p.device)
        a, b = a[live], b[:, live] * p[live].to(dtype)
    return Update(a, b * (weight * scale))


def exact_sum(updates: Sequence[Update]) -> Update:
    """The sum as concatenated factors; beside a side that is shorter than that, as itself.

    >>> one = Update(torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[1.0], [3.0]]))
    >>> exact_sum([one, one]).dense()
    tensor([[ 2.,  0.,  4.],
            [ 6.,  0., 12.]])
    """
    a, b = torch.cat([u.A for u in updates]), torch.cat([u.B for u in updates], dim=1)
    (rank, d_in), d_out = a.shape, b.shape[0]
    if rank <= min(d_in, d_out):
        return Update(a, b)
    if d_in < d_out:
        return Update(torch.eye(d_in, dtype=a.dtype, device=a.device), b @ a)
    return Update(b @ a, torch.eye(d_out, dtype=b.dtype, device=b.device))


def recompressed(update: Update, rank: int) -> tuple[Update, Lost]:
    """The best update of that rank: QR of both factors, SVD of the small matrix between them.

    B A = Q_b (R_b R_a^T) Q_a^T, so no matrix of the weight's size is ever made. An update that has
    the rank already stays as it is.
    """
    if update.rank <= rank:
        return update, Lost(0.0, update.norm())
    q_b, r_b = torch.linalg.qr(update.B)
    q_a, r_a = torch.linalg.qr(update.A.mT)
    u, s, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = s[:rank].sqrt()  # half of each singular value to either factor: they train alike
    lost = Lost(float(torch.linalg.vector_norm(s[rank:])), float(torch.linalg.vector_norm(s)))
    return Update((root[:, None] * vt[:rank]) @ q_a.mT, q_b @ (u[:, :rank] * root)), lost


def best_of_rank(delta: Tensor, rank: int) -> tuple[Update, Lost]:
    """The best update of that rank to a dense one, from the eigenvectors of its smaller square.

    In fp64: squaring a matrix squares what rounding does to its small singular values.
    """
    turned = delta.shape[0] > delta.shape[1]
    flat = delta.double().mT if turned else delta.double()
    vectors = torch.linalg.eigh(flat @ flat.mT).eigenvectors[:, -rank:].flip(1)
    rows = vectors.mT @ flat
    norms = [float(torch.linalg.vector_norm(m)) for m in (flat - vectors @ rows, flat)]
    root = torch.linalg.vector_norm(rows, dim=1).sqrt()
    a, b = rows / torch.where(root > 0, root, 1)[:, None], vectors * root
    if turned:
        a, b = b.mT, a.mT
    return Update(a.to(delta.dtype).contiguous(), b.to(delta.dtype).contiguous()), Lost(*norms)


def ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """Trim, elect a sign, average those that agree (arXiv 2306.01708).

    Of each delta the `density` largest magnitudes stay (all of equal magnitude, if they tie); the
    sign of an entry is that of the sum; entries with that sign are averaged, others left out. Where
    the sum is exactly 0 no sign is elected and the entry is 0.

    >>> ties([torch.tensor([4.0, 1.0, -3.0]), torch.tensor([-1.0, 2.0, -5.0])], density=2 / 3)
    tensor([ 4.,  2., -4.])
    """
    kept = torch.stack([trimmed(delta, density) for delta in deltas])
    elected = kept.sum(0).sign()
    agree = (kept.sign() == elected) & (elected != 0)
    return (kept * agree).sum(0) / agree.sum(0).clamp_min(1)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """A delta without its smallest magnitudes.

    >>> trimmed(torch.tensor([0.5, -2.0, 1.0, 0.0]), density=0.5)
    tensor([ 0., -2.,  1.,  0.])
    """
    size, count = delta.abs(), delta.numel()
    kept = max(1, round(density * count))
    smallest = size.flatten().kthvalue(count - kept + 1).values
    return torch.where(size >= smallest, delta, 0)


def dare(delta: Tensor, density: float, generator: Generator) -> Tensor:
    """Drop entries at random, rescale those that stay by 1 / density (arXiv 2311.03099).

    >>> dare(torch.ones(6), 0.5, torch.Generator().manual_seed(0))
    tensor([2., 0., 2., 2., 2., 0.])
    """
    drawn = torch.rand(delta.shape, generator=generator).to(delta.device)  # on the CPU: same bits
    return torch.where(drawn < density, delta / density, 0)


def own_generator(*parts: object) -> Generator:
    """Random numbers of a place: they depend on nothing drawn elsewhere."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:7], "big"))
