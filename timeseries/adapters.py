"""One-for-All's two published recipes: what the paper says, and what its code does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..core.adapters.lora import LoRA
from ..core.recipe import require
from .patches import Patches

Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class Published:
    """A recipe for the position table and the output layer, and how its sets were trained.

    `recipe` sits at both sites (`Network.sites`): y += s B A x with s = alpha / sqrt(rank). At the
    table A = 0 and B is standard normal, at the output layer B = 0 and A is normal; so a fresh set
    changes nothing. `schedule`: "cosine" lowers the rate by epoch from `lr` to `last_lr` in
    `cosine_epochs`. Both train with Adam and without weight decay.
    """

    recipe: LoRA
    patches: Patches
    lr: float
    schedule: Schedule
    cosine_epochs: int = 20
    last_lr: float = 1e-8

    @property
    def training(self) -> dict[str, Any]:
        """The settings of `SeriesTask` beside the recipe.

        >>> paper().training["lr"], code().training["schedule"], code().training["patches"]
        (0.001, 'cosine', Patches(length=16, stride=8))
        """
        names = ("patches", "lr", "schedule", "cosine_epochs", "last_lr")
        return {name: getattr(self, name) for name in names}


def paper(rank: int = 16) -> Published:
    """As arXiv 2603.29756 says: alpha 1, patches that do not overlap, lr 1e-3.

    Not said there, hence our choice: the standard deviation of A, which the theorem only wants
    independent of the rank (1/sqrt(inputs)), no dropout at the adapters, and a constant rate. The
    paper also says that there is no positional encoding, and its count of 0.55 million parameters
    holds for patches that overlap by half: we keep its words on patches, and the position table,
    without which there would be one site.

    >>> paper().recipe.scale_of(16)
    0.25
    """
    recipe = LoRA(rank=rank, alpha=1.0, scaling="rank_stabilised", init="gaussian")
    return Published(recipe, Patches(16, 16), lr=1e-3, schedule="constant")


def code(rank: int = 16) -> Published:
    """As the authors' scripts for ETTh1 and ETTh2 do: alpha 16, stride 8, lr 1e-4 with a cosine.

    A starts with standard deviation 1/rank, so that the first steps do shrink with the rank; the
    scripts keep the rank at 16. With 10 epochs the cosine only falls to half.

    >>> code().recipe.scale_of(16)
    4.0
    """
    require(rank >= 1, f"rank={rank} is not allowed: a whole number from 1")
    recipe = LoRA(
        rank=rank,
        alpha=16.0,
        scaling="rank_stabilised",
        init="gaussian",
        init_std=1 / rank,
        dropout=0.01,
    )
    return Published(recipe, Patches(16, 8), lr=1e-4, schedule="cosine")


PUBLISHED = {"paper": paper, "code": code}
