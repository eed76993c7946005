"""MoSA, Mixture of Sparse Adapters (arXiv 2312.02923): an AdaptFormer whose entries take turns.

Deviations from the authors' code, which keeps N dense copies and masks their gradients: one stored
weight T serves all experts (the same values without weight decay, at 1/N of the memory), and a
split T never decays, because decay would also move experts that were not drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Generator, Tensor, nn

from ..errors import AdaptError
from ..recipe import Adapter, Recipe, require, require_finite, require_rank
from .bottleneck import (
    Bottleneck,
    BottleneckAdapter,
    Projections,
    add_bottleneck,
    require_choice,
    require_fraction,
    transformer_blocks,
)

if TYPE_CHECKING:
    from ..layers import FrozenLayer
    from ..sites import Site

SHARES: Final = ("down", "up", "none")
PARTITIONS: Final = ("all", "row", "column")
INACTIVE: Final = ("init", "zero")


@dataclass(frozen=True, kw_only=True)
class MoSA(Recipe):
    """y = Block(x) + scale * (B_j drop(gelu(A_i LN(h) + a_i)) + b_j), h what enters the MLP branch.

    A [r, d] and B [d, r] are split at random into `experts` equal groups of entries. Every training
    forward draws i and j, one each for the whole batch; expert i's A is T where i owns the entry
    and, elsewhere, A's initial value (`inactive="init"`) or 0. Biases are whole, one per expert.
    `share` names the projection that stays dense; `partition` splits the whole matrix, or each
    `row` or `column` of it. Evaluation uses the mean over the experts, (T + (N-1) A_init) / N: the
    plain bottleneck that `deployed` returns and that the adapter file holds.

    i and j come from torch's global CPU generator, not from one of the adapter's own: activation
    checkpointing, resuming and torch.compile restore that one. (The inductor backend draws from
    its own unless `torch._inductor.config.fallback_random` is set. DDP ranks may draw differently:
    gradients are averaged all the same.) Adam's momentum goes on moving an expert that was drawn
    before, as in the authors' code; weight decay moves none, see above.

    `consistency` weighs the symmetric KL between two forwards of a batch, see `symmetric_kl`.
    The authors train with AdamW, lr 5e-4 to 5e-3, weight decay 0.01, 100 epochs, 10 warm-up.

    Raises `AdaptError` for a setting out of range and for more experts than entries to share.

    >>> from polyadapt.core import MoSA, Site
    >>> site = Site("blocks.0", None, None, None, "block", (768,), "output", "a whole module")
    >>> adapter = MoSA(rank=64, experts=4).build(site, None, None)
    >>> sum(p.numel() for p in adapter.deployed().parameters())  # 2dr + r + d, norm 2d
    100672
    """

    rank: int = 64
    experts: int = 4
    share: str = "down"
    partition: str = "all"
    inactive: str = "init"
    scale: float = 0.1
    dropout: float = 0.1
    norm: bool = True
    consistency: float = 1.0

    def __post_init__(self) -> None:
        require_rank("MoSA", self.rank)
        whole = isinstance(self.experts, int) and not isinstance(self.experts, bool)
        require(
            whole and 1 <= self.experts <= 255,
            f"MoSA: experts={self.experts!r} is not allowed: a whole number from 1 to 255",
        )
        require_choice("MoSA", "share", self.share, SHARES)
        require_choice("MoSA", "partition", self.partition, PARTITIONS)
        require_choice("MoSA", "inactive", self.inactive, INACTIVE)
        require_finite("MoSA", scale=self.scale, consistency=self.consistency)
        require_fraction("MoSA", "dropout", self.dropout)
        require(self.consistency >= 0, f"MoSA: consistency={self.consistency} is below 0")

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        start = self.deployed().start(site, generator)
        down = self._split(start.down, self.share == "down", generator)
        up = self._split(start.up, self.share == "up", generator)
        return MoSAAdapter(self, down, up, start, site.name)

    def _split(self, weight: Tensor, shared: bool, generator: Generator | None) -> Experts:
        number = 1 if shared else self.experts
        owner = partition(weight, number, self.partition, generator)
        return Experts(weight, owner, number, keep_init=self.inactive == "init")

    def default_at(self, model: nn.Module) -> Sequence[str]:
        return transformer_blocks(model)

    def deployed(self) -> Bottleneck:
        """The plain AdaptFormer that the experts are averaged into."""
        return Bottleneck(
            rank=self.rank,
            placement="parallel_ffn",
            norm=self.norm,
            scale=self.scale,
            dropout=self.dropout,
            down_init="kaiming",
        )

    def parameter_groups(
        self, adapters: Mapping[str, Adapter], lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Dense matrices decay; split ones, biases and the norm do not."""
        modules = [m for adapter in adapters.values() for m in adapter.modules()]
        dense = [m.weight for m in modules if isinstance(m, Experts) and m.number == 1]
        decays = {id(weight) for weight in dense}
        tensors = [p for a in adapters.values() for p in a.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in tensors if id(p) in decays], "weight_decay": weight_decay},
            {"params": [p for p in tensors if id(p) not in decays], "weight_decay": 0.0},
        ]
        return [{**group, "lr": lr} for group in groups if group["params"]]


def partition(weight: Tensor, experts: int, mode: str, generator: Generator | None) -> Tensor:
    """The owner of every entry: each expert owns as many (+-1), at random; uint8 of weight's shape.

    Scores u ~ U(0, 1) are sorted over the whole matrix, each row or each column (n entries); expert
    i owns the ranks above floor(i n / N) up to floor((i + 1) n / N).

    >>> partition(torch.zeros(3, 8), 4, "row", None).sort().values[0].tolist()
    [0, 0, 1, 1, 2, 2, 3, 3]
    """
    if experts == 1:  # draws nothing, so that one expert trains as the plain adapter does
        return torch.zeros(weight.shape, dtype=torch.uint8, device="cpu")
    scores = torch.rand(weight.shape, dtype=torch.float32, device="cpu", generator=generator)
    columns = scores.t().contiguous()
    lines = {"all": scores.reshape(1, -1), "row": scores, "column": columns}[mode]
    n = lines.shape[1]
    if experts > n:
        raise AdaptError(f"MoSA: {experts} experts cannot share {n} entries (partition={mode!r})")
    rank = lines.argsort(dim=1).argsort(dim=1)  # 0-based: rank k is the (k + 1)-th in order
    bounds = torch.tensor([i * n // experts for i in range(1, experts)], device="cpu")
    owner = torch.bucketize(rank, bounds, right=True).to(torch.uint8)
    return (owner.t() if mode == "column" else owner.reshape(weight.shape)).contiguous()


class Experts(nn.Module):
    """One projection's experts: T, who owns which entry, and a whole bias each."""

    owner: Tensor
    initial: Tensor | None

    def __init__(self, weight: Tensor, owner: Tensor, number: int, keep_init: bool) -> None:
        super().__init__()
        self.number = number
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(weight.new_zeros(number, len(weight)))
        self.register_buffer("owner", owner if number > 1 else None)
        # An initial value of zero needs no second copy.
        keep = keep_init and number > 1 and bool(weight.any())
        self.register_buffer("initial", weight.clone() if keep else None)

    def draw(self) -> Tensor:
        """An expert's number [1], for this forward; a tensor, which torch.compile can trace."""
        return torch.randint(self.number, (1,), device="cpu")

    def drawn(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of one expert at random; a single one is not drawn."""
        if self.number == 1:
            return self.weight, self.bias[0]
        return self.expert(self.draw().to(self.weight.device))

    def expert(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of expert i [1]: T where it owns the entry, else the initial value."""
        elsewhere = 0.0 if self.initial is None else self.initial
        return torch.where(self.owner == i, self.weight, elsewhere), self.bias.index_select(0, i)[0]

    def mean(self) -> tuple[Tensor, Tensor]:
        """The mean over the experts: each entry is T in one, its initial value in the others."""
        total: Tensor = self.weight
        if self.initial is not None:
            total = total + (self.number - 1) * self.initial
        return total / self.number, self.bias.mean(0)


class MoSAAdapter(Adapter):
    """The experts at one block."""

    norm_gain: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def __init__(
        self, recipe: MoSA, down: Experts, up: Experts, start: Projections, where: str
    ) -> None:
        super().__init__()
        self.recipe = recipe.deployed()
        self.input = "ffn"
        self.where = where
        self.down = down
        self.up = up
        for name in ("norm_gain", "norm_bias"):
            tensor = getattr(start, name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))

    def output(self, x: Tensor, y: Tensor, layer: FrozenLayer) -> Tensor:
        """x [..., d] enters the MLP branch, y [..., d] leaves the block -> y'."""
        tensors = self._drawn() if self.training else self._mean()
        return add_bottleneck(self.recipe, tensors, x, y, self.training, self.where)

    def deployed(self) -> Adapter:
        """The mean adapter: the very output that evaluation has, bit for bit."""
        with torch.no_grad():
            plain = BottleneckAdapter(self.recipe, self._mean(), self.where)
        return plain.train(self.training)

    def _drawn(self) -> Projections:
        return self._with(self.down.drawn(), self.up.drawn())

    def _mean(self) -> Projections:
        return self._with(self.down.mean(), self.up.mean())

    def _with(self, down: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor]) -> Projections:
        return Projections(down[0], up[0], down[1], up[1], self.norm_gain, self.norm_bias)


def symmetric_kl(z1: Tensor, z2: Tensor) -> Tensor:
    """SKL = 1/2 [KL(sg(p2) || p1) + KL(sg(p1) || p2)], mean over the batch; sg stops the gradient.

    z1, z2 [..., classes] are the logits of two forwards of one batch, p their softmax. The gradient
    for z1 is (p1 - p2) / (2 * batch).

    >>> round(float(symmetric_kl(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))), 6)
    0.462117
    """
    log_p1, log_p2 = z1.log_softmax(-1), z2.log_softmax(-1)
    return (_kl_to_fixed(log_p2, log_p1) + _kl_to_fixed(log_p1, log_p2)) / 2


def _kl_to_fixed(target: Tensor, log_p: Tensor) -> Tensor:
    target = target.detach()
    return (target.exp() * (target - log_p)).sum(-1).mean()
