"""Hadamard matrices by Paley's construction (1933), for the factor of a size that 2^m leaves over.

For a prime q let Q [q, q] have 1 at (i, j) where i - j is a square modulo q, -1 where it is not, 0
on the diagonal. Bordering Q by ones gives orders q + 1 (q = 3 mod 4) and 2 (q + 1) (q = 1 mod 4).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LARGEST = 256  # a larger factor would be a dense product in all but name


def factor(size: int) -> int | None:
    """The smallest K with a matrix here and size = K 2^m, or None.

    >>> [factor(n) for n in (384, 768, 1024, 1280, 3072, 896, 197)]
    [12, 12, 1, 20, 12, 28, None]
    """
    power = size & -size
    odd = size // power if size > 0 else 0
    if odd == 1:
        return 1
    orders = (odd << shift for shift in range(2, power.bit_length()))
    return next((k for k in orders if k <= LARGEST and _prime(k) is not None), None)


def sizes_beside(size: int) -> tuple[int | None, int]:
    """The nearest sizes below and above that have a factor."""
    below = next((n for n in range(size - 1, 0, -1) if factor(n)), None)
    return below, next(n for n in range(size + 1, 2 * max(size, 1) + 1) if factor(n))


@functools.cache
def hadamard_matrix(order: int) -> Tensor:
    """H [order, order] of 1 and -1 with H H^T = order I, in fp64; order 1 or Paley's.

    >>> (hadamard_matrix(12) @ hadamard_matrix(12).T).diagonal()[:3].tolist()
    [12.0, 12.0, 12.0]
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = _prime(order)
    if q is None:
        raise ValueError(f"Paley's construction over the primes has no matrix of order {order}")
    numbers = torch.arange(q)
    squares = set((numbers[1:] ** 2 % q).tolist())
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
    core = character[(numbers[:, None] - numbers[None, :]) % q].double()
    bordered = torch.ones(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 0] = 0
    bordered[1:, 1:] = core
    eye = torch.eye(q + 1, dtype=torch.float64)
    if q % 4 == 3:  # Q is skew: I + S has orthogonal rows once the border is skew, too
        bordered[1:, 0] = -1
        return bordered + eye
    ones, mixed = torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[1.0, -1], [-1, -1]])
    return torch.kron(bordered, ones.double()) + torch.kron(eye, mixed.double())


def _prime(order: int) -> int | None:
    """The q of a construction of this order."""
    if order % 4:
        return None
    for q, rest in ((order - 1, 3), (order // 2 - 1, 1)):
        if q > 1 and q % 4 == rest and all(q % d for d in range(2, int(q**0.5) + 1)):
            return q
    return None
