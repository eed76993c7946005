"""`polyadapt timeseries rank-stability`: how the first update of LoRA grows with its rank.

At a linear layer W' = W + s B A with A [r, d] random of standard deviation sigma and B = 0, one
step of gradient descent at rate h on an input x with the output's gradient v makes
s B A x = -h s^2 |A x|^2 v, of mean norm h s^2 r sigma^2 |x|^2 |v|. That is the claim of rsLoRA
(arXiv 2312.03732) and One-for-All (2603.29756): level in r for s = alpha / sqrt(r), falling as
1 / r for s = alpha / r. One-for-All's code draws A with sigma = 1 / r: then it falls as 1 / r^2 all
the same.
Both papers train with Adam, whose first step takes only the gradient's signs: s B A x then has the
mean norm h s r sigma |x| sqrt(2 d / pi), level for alpha / r and growing as sqrt(r) for
alpha / sqrt(r). The command measures both on our own layers.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn
from torch.optim import SGD, Adam

from ..core.adapters.lora import LoRA
from ..core.cli import OneLineParser
from ..core.container import require_place, write_atomically
from ..core.errors import AdaptError
from ..core.sets import attach

WIDTH = 512
RANKS = (4, 8, 16, 32, 64, 128, 256)
_RATE = 1e-3

RULES: Mapping[str, Callable[[int], LoRA]] = {
    "alpha / r": lambda r: LoRA(rank=r, alpha=16, init="gaussian"),
    "alpha / sqrt(r)": lambda r: LoRA(rank=r, alpha=16, scaling="rank_stabilised", init="gaussian"),
    "alpha / sqrt(r), A of std 1 / r": lambda r: LoRA(
        rank=r, alpha=16, scaling="rank_stabilised", init="gaussian", init_std=1 / r
    ),
}
"""What is compared; A's standard deviation is 1 / sqrt(d) unless said. The last is the published
code's."""

OPTIMISERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {"SGD": SGD, "Adam": Adam}

GROWTH = {
    ("SGD", "alpha / r"): -1.0,
    ("SGD", "alpha / sqrt(r)"): 0.0,
    ("SGD", "alpha / sqrt(r), A of std 1 / r"): -2.0,
    ("Adam", "alpha / r"): 0.0,
    ("Adam", "alpha / sqrt(r)"): 0.5,
    ("Adam", "alpha / sqrt(r), A of std 1 / r"): -0.5,
}
"""The exponent of r by the formulas above."""


@dataclass(frozen=True)
class Curve:
    """Mean norms of s B A x after one step, by rank."""

    optimiser: str
    rule: str
    norms: Mapping[int, float]

    def ratio(self, low: int, high: int) -> float:
        """The norm at rank `high`, of that at rank `low`."""
        return self.norms[high] / self.norms[low]


def update_norm(recipe: LoRA, optimiser: str, seed: int, width: int = WIDTH) -> float:
    """|s B A x| after one step at a layer [width, width] whose frozen weight is zero.

    The input is standard normal, the output's gradient a random direction of length 1.

    >>> round(update_norm(LoRA(rank=4, init="gaussian"), "SGD", seed=0, width=32), 3) > 0
    True
    """
    generator = Generator().manual_seed(seed)
    x, v = (torch.randn(1, width, generator=generator) for _ in range(2))
    layer = nn.Linear(width, width, bias=False)
    nn.init.zeros_(layer.weight)  # so that what comes out is the update alone
    model = nn.Sequential(layer)
    adapters = attach(model, recipe, "0", generator=generator)
    step = OPTIMISERS[optimiser](adapters.parameters(), lr=_RATE)
    (model(x) * v / v.norm()).sum().backward()
    step.step()
    with torch.no_grad():
        return float(model(x).norm())


def curve(optimiser: str, rule: str, ranks: Sequence[int] = RANKS, draws: int = 64) -> Curve:
    """The mean over `draws` draws of everything, at each rank."""
    norms = {
        rank: statistics.mean(
            update_norm(RULES[rule](rank), optimiser, seed) for seed in range(draws)
        )
        for rank in ranks
    }
    return Curve(optimiser, rule, norms)


def main(argv: list[str]) -> int:
    """Measure all rules with both optimisers; print a table, write a picture."""
    asked = _parser().parse_args(argv)
    if asked.draws < 1:
        raise AdaptError(f"draws={asked.draws} is not allowed: a whole number from 1")
    require_place(asked.out)
    curves = [curve(o, rule, draws=asked.draws) for o in OPTIMISERS for rule in RULES]
    print(table(curves))
    write_atomically(asked.out, picture(curves))
    print(asked.out)
    return 0


def table(curves: Sequence[Curve]) -> str:
    """Markdown: the norm by rank, of that at the highest (the steadiest), and the formula."""
    ranks = list(curves[0].norms)
    rows = [["optimiser", "scale", *(f"r = {rank}" for rank in ranks), "formula"]]
    rows.append(["---"] * len(rows[0]))
    for found in curves:
        growth = GROWTH[found.optimiser, found.rule]
        ratios = [f"{found.ratio(ranks[-1], rank):.3g}" for rank in ranks]
        rows.append([found.optimiser, found.rule, *ratios, f"r^{growth:g}" if growth else "level"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def picture(curves: Sequence[Curve]) -> bytes:
    """A PNG: a panel per optimiser, measured norms as dots, the formulas as lines."""
    from matplotlib.figure import Figure

    from ..core.images.pictures import png

    names = list(dict.fromkeys(found.optimiser for found in curves))
    figure = Figure(figsize=(1 + 4.6 * len(names), 4.2), dpi=120, layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
        axis.set(xscale="log", yscale="log", title=f"one step of {name}")
        axis.set(xlabel="rank r", ylabel="|s B A x| / that at the highest rank")
        for found in curves:
            if found.optimiser == name:
                _draw(axis, found)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle("First update by rank: measured (dots) and by the formula (lines)")
    return png(figure)


def _draw(axis: Any, found: Curve) -> None:
    ranks = list(found.norms)
    growth = GROWTH[found.optimiser, found.rule]
    (line,) = axis.plot(ranks, [(rank / ranks[-1]) ** growth for rank in ranks], label=found.rule)
    values = [found.ratio(ranks[-1], rank) for rank in ranks]
    axis.plot(ranks, values, "o", color=line.get_color())
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    axis.minorticks_off()


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").splitlines()[0]
    parser = OneLineParser(prog="polyadapt timeseries rank-stability", description=about)
    add = parser.add_argument
    add("--out", type=Path, default=Path("rank_stability.png"), metavar="FILE", help="the picture")
    add("--draws", type=int, default=64, metavar="N", help="that each mean is of; default: 64")
    return parser
