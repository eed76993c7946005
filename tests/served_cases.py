"""A batch that names one of several low-rank sets per sample, for the tests of `multi_lora`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyadapt.core.kernels.multi_lora import Sets, multi_lora

D_IN, D_OUT = 10, 12


@dataclass(frozen=True)
class Served:
    """x [m, t, d_in], y [m, t, d_out], A_k and B_k of sets that differ in rank and scale."""

    x: Tensor
    y: Tensor
    downs: Sequence[Tensor]
    ups: Sequence[Tensor]
    scales: Sequence[float]
    ids: Tensor
    sets: Sets

    def run(self) -> Tensor:
        """The op."""
        return multi_lora(self.x, self.y, self.sets, self.ids)

    def again(self) -> Served:
        """With sets of the factors as they are now."""
        return replace(self, sets=Sets.of(self.downs, self.ups, self.scales))


def served_case(
    ranks: Sequence[int],
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    sizes: tuple[int, int] = (D_IN, D_OUT),
    draw: Callable[..., Tensor] = torch.randn,
) -> Served:
    """Three ids or more of each set and of none, shuffled; outputs of about 1."""
    made = torch.Generator().manual_seed(sum(ranks) + tokens)
    d_in, d_out = sizes
    m, n = 3 * (len(ranks) + 1), len(ranks)
    ids = torch.arange(m)[torch.randperm(m, generator=made)] % (n + 1) - 1

    def drawn(*shape: int, by: float = 1.0) -> Tensor:
        return (draw(shape, generator=made) * by).to(device, dtype)

    x, y = drawn(m, tokens, d_in), drawn(m, tokens, d_out)
    downs = [drawn(r, d_in, by=0.25) for r in ranks]
    ups = [drawn(d_out, r, by=0.25) for r in ranks]
    scales = [0.5 + 0.75 * k for k in range(n)]
    sets = Sets.of(downs, ups, scales)
    return Served(x, y, downs, ups, scales, ids.to(device), sets)


def whole_served_case(ranks: Sequence[int], tokens: int) -> Served:
    """Quarters of small whole numbers, so that fp32 holds every sum: no order of it matters."""

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    return served_case(ranks, tokens, draw=draw)
