"""What a window is asked for: the base of all aims."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Generator, Tensor
from torchmetrics import Metric, MetricCollection

from ..core.backbone import one_of_kinds
from ..core.errors import AdaptError
from .network import Network

Batch = Tensor | Sequence[Tensor]  # the windows alone, or with what belongs to them


@dataclass(frozen=True, eq=False)
class Example:
    """A batch taken apart.

    ========  ============================================================
    x         windows [b, L, C]
    target    what should come out
    observed  where x is known [b, L, C]; None: everywhere
    labels    what steps were labelled as [b, L]; None: they were not
    ========  ============================================================
    """

    x: Tensor
    target: Tensor
    observed: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Measures:
    """Means over `count` numbers of a batch, by name."""

    values: dict[str, Tensor]
    count: int


@dataclass(frozen=True, kw_only=True)
class Aim(ABC):
    """Settings that say what is predicted of a window; they travel in the adapter file as JSON.

    `joint`: a patch holds all channels, else every channel is a series of its own. `restores`:
    what the network puts out is brought back to the scale of the window's values.
    """

    joint: ClassVar[bool] = False
    restores: ClassVar[bool] = True

    @property
    def steps_ahead(self) -> int:
        """Steps of future that a batch must bring."""
        return 0

    @property
    def width(self) -> int:
        """Channels in a patch."""
        return 1

    @property
    def rescales(self) -> bool:
        """Every window is normalised by its own mean and std."""
        return True

    def misfit(self, data: object) -> str | None:
        """Why a data module does not fit, in a line."""
        return None

    @abstractmethod
    def outputs(self, look_back: int) -> int:
        """Outputs of the network for one window."""

    @abstractmethod
    def example(self, batch: Batch, draws: Generator | None) -> Example:
        """Take a batch apart; what is random about it is drawn from `draws`, else from torch's."""

    @abstractmethod
    def answer(self, network: Network, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """The prediction for windows x [b, L, C]."""

    @abstractmethod
    def loss_of(self, answer: Tensor, example: Example) -> Tensor:
        """What is minimised: a scalar."""

    @abstractmethod
    def measures(self, answer: Tensor, example: Example) -> Measures:
        """What is logged of a batch; the mean over batches is exact."""

    def metric(self, part: str) -> Metric | MetricCollection | None:
        """What only a whole "val" or "test" part tells, from what `judged` returns of batches."""
        return None

    def judged(self, answer: Tensor, example: Example) -> tuple[Tensor, Tensor]:
        """What `metric` is told of a batch."""
        raise TypeError(f"{type(self).__name__} has no metric")

    @classmethod
    def kinds(cls) -> dict[str, type[Self]]:
        """The aims by name."""
        return {kind.__name__: kind for kind in cls.__subclasses__()}

    def to_json(self) -> dict[str, Any]:
        """The kind of aim and its settings as JSON values."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        return {"aim": type(self).__name__, **plain}

    @classmethod
    def from_json(cls, data: object) -> Self:
        """The settings that `to_json` wrote; an unknown kind or setting is refused by name."""
        return one_of_kinds("aim", cls.kinds(), data)


def parts_of(batch: Batch, needed: int) -> Sequence[Tensor]:
    """The tensors of a batch; refused when there are fewer than needed."""
    parts = [batch] if isinstance(batch, Tensor) else batch
    if len(parts) < needed:
        raise AdaptError(f"a batch has {len(parts)} tensors, this aim needs {needed}")
    return parts


def each_channel(network: Network, x: Tensor, observed: Tensor | None = None) -> Tensor:
    """Windows x [b, L, C] through a network of one channel: its outputs [b, C, o]."""
    folded = network(_folded(x), None if observed is None else _folded(observed))
    outputs: Tensor = folded.unflatten(0, (x.shape[0], x.shape[2]))
    return outputs


def _folded(x: Tensor) -> Tensor:
    """[b, L, C] -> [b C, L, 1]."""
    return x.mT.flatten(0, 1).unsqueeze(-1)
