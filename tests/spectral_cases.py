"""Other ways to the same decomposition, as other machines have them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

Decomposition = tuple[Tensor, Tensor, Tensor]
_svd = torch.linalg.svd


def flipped(w: Tensor, full_matrices: bool = False) -> Decomposition:
    """The same algorithm, every other pair of vectors with the other sign."""
    u, s, vh = _svd(w, full_matrices=full_matrices)
    signs = 1.0 - 2.0 * (torch.arange(len(s), dtype=w.dtype) % 2)
    return -u * signs, s, -signs[:, None] * vh


def by_eigenvectors(w: Tensor, full_matrices: bool = False) -> Decomposition:
    """Another algorithm: eigenvectors of the smaller square, with signs by chance."""
    if w.shape[0] > w.shape[1]:
        u, s, vh = by_eigenvectors(w.mT)
        return vh.mT, s, u.mT
    u = torch.linalg.eigh(w @ w.mT).eigenvectors.flip(1)
    u = u * (1 - 2 * torch.randint(2, u.shape[1:], generator=Generator().manual_seed(3)))
    rows = u.mT @ w
    s = torch.linalg.vector_norm(rows, dim=1)
    return u, s, rows / s[:, None]


def turned(w: Tensor, full_matrices: bool = False) -> Decomposition:
    """The first two pairs of vectors turned by a small angle, as where their values are equal."""
    u, s, vh = _svd(w, full_matrices=full_matrices)
    turn = torch.eye(len(s), dtype=w.dtype)
    turn[:2, :2] = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    return u @ turn, s, turn.mT @ vh


def on_another_machine(monkeypatch: pytest.MonkeyPatch, svd: Callable[..., Decomposition]) -> None:
    """From now on weights are decomposed so, and nothing is known of earlier ones."""
    monkeypatch.setattr(torch.linalg, "svd", svd)
    monkeypatch.setattr("polyadapt.core.spectral._shared", {})
