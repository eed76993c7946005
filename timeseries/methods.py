"""The methods that `polyadapt timeseries compare` puts side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor, nn

from ..core.adapters.lora import LoRA
from ..core.errors import AdaptError
from ..core.kinds import is_conv1d_of_gpt2
from ..core.sets import attach
from ..core.sites import select
from .backbones import Backbone, NoLanguageModel, OneAttention
from .baselines import DLinear, LastValue, PatchTST, SeasonalNaive
from .blocks import Blocks
from .network import OUT_LAYER, Network
from .patches import Patches
from .protocol import Candidate


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a method is built from; `period` is the rows of a season."""

    look_back: int
    horizon: int
    period: int
    seed: int
    backbone: Backbone
    patches: Patches
    adapter: LoRA

    def network(self, backbone: Backbone) -> Network:
        """The forecaster around the blocks; its dense layers are drawn from `seed`."""
        return Network(
            backbone.build(), self.look_back, self.patches, outputs=self.horizon, seed=self.seed
        )


@dataclass(frozen=True, kw_only=True)
class Method:
    """A name, how it is built, and its learning rate (0: it learns nothing)."""

    name: str
    build: Callable[[Given], Candidate]
    lr: float = 1e-3
    language: bool = True
    """Whether backbone, patches and adapter matter to it."""

    @property
    def learns(self) -> bool:
        """Whether it is trained at all, so that seeds differ."""
        return self.lr > 0


class Forecaster(nn.Module):
    """A `Network` as what a comparison takes: past [b, L, 1] -> future [b, T, 1]."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, past: Tensor) -> Tensor:
        """[b, L, 1] -> [b, T, 1]."""
        y: Tensor = self.network(past)
        return y.unsqueeze(-1)


# One-for-All, on the language model and on what could stand in its place


def one_for_all(given: Given, backbone: Backbone | None = None) -> Candidate:
    """Adapters on the position table and the output layer of a network that is frozen else."""
    backbone = backbone or given.backbone
    network = given.network(backbone)
    return _with_set(given, network, backbone, given.adapter, network.sites)


def with_random_weights(given: Given) -> Candidate:
    """One-for-All on random weights of the same class and size."""
    names = {field.name for field in dataclasses.fields(given.backbone)}
    if not {"pretrained", "seed"} <= names:
        raise AdaptError(f"{given.backbone} has no pretrained weights to do without")
    changes: dict[str, Any] = {"pretrained": False, "seed": given.seed}
    return one_for_all(given, dataclasses.replace(given.backbone, **changes))


def without_language_model(given: Given) -> Candidate:
    """One-for-All on a random position table alone, as wide and as long as the model's."""
    blocks = given.backbone.build()
    bare = NoLanguageModel(
        width=blocks.width, positions=_table(blocks).num_embeddings, seed=given.seed
    )
    return one_for_all(given, bare)


def with_one_attention(given: Given) -> Candidate:
    """One-for-All on one random attention layer, of 12 heads where the width allows it."""
    blocks = given.backbone.build()
    heads = math.gcd(12, blocks.width)
    layer = OneAttention(
        width=blocks.width, heads=heads, positions=_table(blocks).num_embeddings, seed=given.seed
    )
    return one_for_all(given, layer)


# The same network, trained otherwise


def gpt4ts(given: Given) -> Candidate:
    """GPT4TS (arXiv 2302.11939): LayerNorms, positions, input and output layer are trained."""
    network = given.network(given.backbone).requires_grad_(False)
    norms = [m for m in network.modules() if isinstance(m, nn.LayerNorm)]
    for module in (*norms, _table(network.blocks), network.in_layer, network.out_layer):
        module.requires_grad_(True)
    return Candidate(Forecaster(network), drawn=_drawn(network, given.backbone))


def full(given: Given) -> Candidate:
    """Every tensor is trained."""
    network = given.network(given.backbone).requires_grad_(True)
    return Candidate(Forecaster(network), drawn=_drawn(network, given.backbone))


def lora(given: Given) -> Candidate:
    """LoRA (arXiv 2106.09685) on every linear layer of the blocks and on the output layer.

    Its rank is the one whose number of parameters is nearest to One-for-All's; alpha is the rank.
    """
    network = given.network(given.backbone)
    budget = sum(given.adapter.least_numbers(s) or 0 for s in select(network, network.sites))
    at = [f"blocks.{path}" for path, m in network.blocks.named_modules() if _is_linear(m)]
    sites = select(network, [*at, OUT_LAYER])
    rank = nearest_rank(budget, sum(sum(site.shape) for site in sites))
    return _with_set(given, network, given.backbone, LoRA(rank=rank), [*at, OUT_LAYER])


def nearest_rank(budget: int, per_rank: int) -> int:
    """The rank, from 1, that makes rank * per_rank nearest to `budget`.

    >>> nearest_rank(546_304, 100_000), nearest_rank(10, 100)
    (5, 1)
    """
    return max(1, round(budget / per_rank))


def _with_set(
    given: Given, network: Network, backbone: Backbone, recipe: LoRA, at: list[str]
) -> Candidate:
    drawn = _drawn(network, backbone)
    generator = Generator().manual_seed(given.seed)
    adapters = attach(network, recipe, at, generator=generator)
    return Candidate(Forecaster(network), adapters, drawn)


def _drawn(network: Network, backbone: Backbone) -> list[Tensor]:
    """What a public backbone does not give: the dense layers, and random blocks."""
    dense: list[Tensor] = [*network.in_layer.parameters(), *network.out_layer.parameters()]
    public = getattr(backbone, "pretrained", False)
    return dense if public else [*dense, *network.blocks.parameters()]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d_of_gpt2(module)


def _table(blocks: Blocks) -> nn.Embedding:
    table = blocks.get_submodule(blocks.positions_at)
    assert isinstance(table, nn.Embedding), "blocks promise it"
    return table


# Those without a network


def _last_value(given: Given) -> Candidate:
    return Candidate(LastValue(given.horizon))


def _seasonal_naive(given: Given) -> Candidate:
    return Candidate(SeasonalNaive(given.horizon, given.period))


def _dlinear(given: Given) -> Candidate:
    return Candidate(DLinear(given.look_back, given.horizon))


def _patchtst(given: Given) -> Candidate:
    return Candidate(PatchTST(given.look_back, given.horizon))


_ALL = (
    Method(name="last-value", build=_last_value, lr=0, language=False),
    Method(name="seasonal-naive", build=_seasonal_naive, lr=0, language=False),
    Method(name="dlinear", build=_dlinear, language=False),
    Method(name="patchtst", build=_patchtst, language=False),
    Method(name="one-for-all", build=one_for_all),
    Method(name="random-weights", build=with_random_weights),
    Method(name="no-language-model", build=without_language_model),
    Method(name="one-attention", build=with_one_attention),
    Method(name="gpt4ts", build=gpt4ts),
    Method(name="lora", build=lora),
    Method(name="full", build=full, lr=1e-4),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}
"""By name. Their learning rate is that of One-for-All's paper, but for full fine-tuning's."""


def method_called(word: str) -> Method:
    """A method by its name, or `NAME:RATE` for another learning rate.

    >>> method_called("gpt4ts:1e-4").lr
    0.0001
    """
    name, _, rate = word.partition(":")
    if name not in METHODS:
        raise AdaptError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    method = METHODS[name]
    if not rate:
        return method
    try:
        lr = float(rate)
    except ValueError:
        lr = math.nan
    if not (lr > 0 and math.isfinite(lr) and method.learns):
        raise AdaptError(f"{word!r}: the learning rate of a method that learns, above 0")
    return dataclasses.replace(method, lr=lr)
