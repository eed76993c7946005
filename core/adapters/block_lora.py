"""Block-LoRA: LoRA whose factors are cut into n blocks that share one down-projection block.

Source: arXiv 2501.16720, read as its title, abstract and first paragraph, with a secondary summary
of the rest; no code of the authors was found. The abstract fixes: the rank-r factors are cut into
sub-matrices, all of them use one down-projection sub-matrix, products become sums, and there are
fewer numbers to train. Ours: the algebra, that is both readings of the cut (`split`), the scale,
the start, the defaults of rank and `blocks`, and `arm_dropout`. Results say nothing of the paper's.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..errors import AdaptError
from ..precision import widened
from ..recipe import Adapter, LowRank, require, require_finite
from .lora import LoRA, Pair, PairAdapter, Scaling, with_branch

if TYPE_CHECKING:
    from ..layers import FrozenLayer
    from ..sets import AdapterSet
    from ..sites import Site, Sites

Split = Literal["rank", "input"]


class RankSplitAdapter(PairAdapter):
    """W' = W + s (B_1 + ... + B_n) A with one A [r / n, d_in] and the arms B_i side by side in B.

    B is [d_out, r], as LoRA's of the nominal rank.
    """

    def __init__(self, pair: Pair, blocks: int, arm_dropout: float = 0.0) -> None:
        super().__init__(pair)
        self.blocks = blocks
        self.rates = (pair.dropout, arm_dropout)
        self.dropout = max(self.rates)  # a mixed batch asks for it: masks of either kind are drawn

    def arms(self) -> Tensor:
        """B as [d_out, n, r / n]: a view."""
        return self.B.view(len(self.B), self.blocks, len(self.A))

    def factors(self) -> tuple[Tensor, Tensor, None, float]:
        """(A, B_1 + ... + B_n, None, s)."""
        return self.A, self.arms().sum(1), None, self.scale

    def weight(self, w: Tensor) -> Tensor:
        """W [d_out, d_in] + s (B_1 + ... + B_n) A, added in fp32 (fp64 for an fp64 weight)."""
        a, b, _, scale = self.factors()
        return widened(w, a, b, scale).to(w.dtype)

    def output(self, x: Tensor, y: Tensor, layer: FrozenLayer) -> Tensor:
        """y + s (B_1 + ... + B_n) A drop(x), the factors in x's dtype, the result in y's.

        With `arm_dropout` it is y + s (B_1 drop_1(A x) + ... + B_n drop_n(A x)) in training.
        """
        of_input, of_arms = self.rates
        if of_input and self.drops(x):
            x = F.dropout(x, of_input)
        if of_arms and self.training:
            return self._by_arm(x, y, layer, of_arms)
        a, b, _, scale = self.factors()
        return with_branch(x, y, layer, a, b, scale)

    def _by_arm(self, x: Tensor, y: Tensor, layer: FrozenLayer, rate: float) -> Tensor:
        """n copies of the bottleneck side by side, a mask on all of them, then all arms at once."""
        dtype = x.dtype if x.is_floating_point() else y.dtype
        hidden = layer.down(x, self.A.to(dtype))
        hidden = F.dropout(torch.cat([hidden] * self.blocks, layer.channel_axis), rate)
        branch = layer.up(hidden, self.B.to(dtype))
        return torch.add(y, branch, alpha=self.scale).to(y.dtype)

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, rank={len(self.A)}, scale={self.scale:g}"


class InputSplitAdapter(PairAdapter):
    """W' = W + s B [A ... A]: n times the same A [r, d_in / n], so A acts on a sum of slices."""

    def __init__(self, pair: Pair, blocks: int) -> None:
        super().__init__(pair)
        self.blocks = blocks

    def factors(self) -> tuple[Tensor, Tensor, None, float]:
        """([A ... A], B, None, s)."""
        return self.A.repeat(1, self.blocks), self.B, None, self.scale

    def weight(self, w: Tensor) -> Tensor:
        """W [d_out, d_in] + s B [A ... A], added in fp32 (fp64 for an fp64 weight)."""
        a, b, _, scale = self.factors()
        return widened(w, a, b, scale).to(w.dtype)

    def output(self, x: Tensor, y: Tensor, layer: FrozenLayer) -> Tensor:
        """y + s B A (x_1 + ... + x_n), x_j the slices of drop(x); y's dtype.

        Only linear layers have slices to add: elsewhere [A ... A] is the factor.
        """
        if self.drops(x):
            x = F.dropout(x, self.dropout)
        a, b, _, scale = self.factors()
        if layer.kind in ("linear", "transposed linear"):
            x, a = x.unflatten(-1, (self.blocks, self.A.shape[1])).sum(-2), self.A
        return with_branch(x, y, layer, a, b, scale)

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, {super().extra_repr()}"


@dataclass(frozen=True, kw_only=True)
class BlockLoRA(LoRA):
    """LoRA of nominal rank r, cut into n = `blocks` that share one down-projection block A.

    `split="rank"`: W' = W0 + s (B_1 + ... + B_n) A with A [r / n, d_in] and n arms B_i
    [d_out, r / n] = 0. `split="input"`: W' = W0 + s B [A ... A] with A [r, d_in / n] and
    B [d_out, r] = 0, so that the n slices of the input are added before A. Either has
    r d_in / n + r d_out numbers where LoRA has r d_in + r d_out, and n = 1 is LoRA to the bit.
    s = alpha / sqrt(r) with the nominal r (`rank_stabilised`), or alpha / r (`standard`).

    Under `split="rank"` all arms get one gradient and stay equal, so it is rank-r/n LoRA whose B
    learns n times as fast: `plain()`. With AdamW the decay of that B is lr wd, not n lr wd.
    `arm_dropout` (ours, 0 unless given) drops the bottleneck [.., r / n] by a mask of each arm's
    own, which makes the arms distinct.

    `ranks` are nominal, too; `dropout` is on the branch's input; other settings are LoRA's.
    At embeddings A = 0, and the sum of the arms (or B) is standard normal.
    Raises `AdaptError` for a rank (or, under `input`, a site's d_in) that `blocks` does not divide.

    >>> from torch import nn
    >>> from polyadapt.core import attach
    >>> made = attach(nn.Sequential(nn.Linear(8, 8)), BlockLoRA(rank=4, blocks=4), at="0")
    >>> made.trainable_count()  # 8 * 4 + 8 * 4 / 4
    40
    """

    rank: int = 2
    alpha: float | None = 1.0
    scaling: Scaling = "rank_stabilised"
    blocks: int = 2
    split: Split = "rank"
    arm_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        n, allowed = self.blocks, get_args(Split)
        whole = isinstance(n, int) and not isinstance(n, bool) and n >= 1
        require(whole, f"BlockLoRA: blocks={n!r} is not allowed: a whole number from 1")
        require(
            isinstance(self.split, str) and self.split in allowed,
            f"BlockLoRA: split={self.split!r} is not allowed: {' or '.join(allowed)}",
        )
        require_finite("BlockLoRA", arm_dropout=self.arm_dropout)
        require(
            0 <= self.arm_dropout < 1,
            f"BlockLoRA: arm_dropout={self.arm_dropout!r} is not in [0, 1)",
        )
        require(
            self.arm_dropout == 0 or self.split == "rank",
            f"BlockLoRA: arm_dropout={self.arm_dropout} needs arms: split='rank'",
        )
        for rank in (self.rank, *self.ranks.values()):
            require(
                rank % self.arms == 0,
                f"BlockLoRA: rank {rank} cannot be cut into blocks={n}: a multiple of {n}",
            )

    @property
    def arms(self) -> int:
        """Summands of B: n under `split="rank"`, else 1."""
        return self.blocks if self.split == "rank" else 1

    def rank_at(self, site: Site) -> int:
        """The rank of the update there: r / n under `split="rank"`, else r."""
        return super().rank_at(site) // self.arms

    def least_numbers(self, site: Site) -> int | None:
        """r d_in / n and r d_out, with the nominal rank."""
        d_out, d_in = site.shape
        return super().rank_at(site) * (d_in // self.blocks + d_out)

    def scale_of(self, rank: int) -> float:
        """s for a site whose update has that rank."""
        return self.plain().scale_of(rank)

    def plain(self) -> LoRA:
        """The LoRA of the same updates and, under `split="rank"`, of the same training.

        Rank r / n and alpha so that s is the same. B learns n times as fast; with AdamW, divide the
        weight decay of B by n, too. (Embeddings then learn at `embedding_lr`: see `LoRA`.)

        >>> made = BlockLoRA(rank=8, blocks=4).plain()
        >>> made.rank, made.alpha, made.lr_ratio
        (2, 0.5, 4.0)
        """
        assert self.alpha is not None, "set by __post_init__"
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(LoRA)}
        by = math.sqrt(self.arms) if self.scaling == "rank_stabilised" else self.arms
        own |= {"rank": self.rank // self.arms, "alpha": self.alpha / by}
        own["ranks"] = {pattern: rank // self.arms for pattern, rank in self.ranks.items()}
        return LoRA(**own | {"lr_ratio": self.lr_ratio * self.arms})

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        """The factors at one site, drawn as `plain()` draws its own."""
        require(
            self.arm_dropout == 0 or site.slot == "output",
            f"BlockLoRA: arm_dropout={self.arm_dropout} cannot act on {site.name}: {site.why}, so"
            " the adapter never sees an input; set arm_dropout=0",
        )
        pair, n = self.pair(site, weight, generator), self.blocks
        if self.split == "rank":
            arms = pair.B.repeat(1, n) / n
            return RankSplitAdapter(dataclasses.replace(pair, B=arms), n, self.arm_dropout)
        d_in = pair.A.shape[1]
        require(
            d_in % n == 0,
            f"BlockLoRA: split='input' cannot cut the {d_in} inputs of {site.name} into blocks={n}",
        )
        return InputSplitAdapter(dataclasses.replace(pair, A=pair.A[:, : d_in // n].clone()), n)


def as_plain(adapters: AdapterSet) -> tuple[LoRA, Sites, dict[str, Tensor]]:
    """A Block-LoRA set as a plain LoRA: recipe, sites and tensors for `save_form` or `attach`.

    The arms are summed, which cuts the stored B by n; under `split="input"` A is written n times.
    Raises `AdaptError` for other methods.

    >>> import torch
    >>> from torch import nn
    >>> from polyadapt.core import attach
    >>> made = attach(nn.Sequential(nn.Linear(8, 6)), BlockLoRA(rank=4, blocks=2), at="0")
    >>> recipe, sites, tensors = as_plain(made)
    >>> recipe.rank, {name: list(t.shape) for name, t in tensors.items()}
    (2, {'0/A': [2, 8], '0/B': [6, 2]})
    """
    recipe = adapters.recipe
    if not isinstance(recipe, BlockLoRA):
        raise AdaptError(
            f"as_plain is a form of BlockLoRA's sets, not of {type(recipe).__name__}'s"
        )
    tensors: dict[str, Tensor] = {}
    for site, adapter in adapters.pairs():
        a, b, _, _ = cast("LowRank", adapter).factors()
        tensors |= {f"{site.name}/A": a.detach(), f"{site.name}/B": b.detach()}
    return recipe.plain(), adapters.sites, tensors
