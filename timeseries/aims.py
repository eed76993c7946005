"""The aims that a configuration can name: forecast, classify, reconstruct, impute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchmetrics import MetricCollection

from ..core.errors import AdaptError
from ..core.recipe import require, require_finite
from .aim import Aim, Batch, Example, Measures, each_channel, parts_of
from .anomaly import AnomalyMetric
from .metrics import smape_loss
from .network import Network

Loss = Literal["mse", "smape", "quantile"]


@dataclass(frozen=True, kw_only=True)
class Forecast(Aim):
    """The next `horizon` T steps of every channel: x [b, L, C] -> [b, T, C].

    `loss`: "mse"; "smape" for competitions (on unscaled values, see `metrics.smape_loss`); or
    "quantile", the mean pinball loss max(q e, (q - 1) e), e = truth - forecast, over the `levels`
    q, of which one is 0.5. The answer then is [b, T, C, Q], sorted by level so that none crosses
    another. Measured: mse and mae of the forecast (the median), in the data's units, and with
    quantiles the share of truths within the outermost levels (`coverage`). Truths may be shorter
    than T where they are only measured: a competition may ask for fewer steps.

    >>> Forecast(horizon=24, loss="quantile").outputs(look_back=96)
    72
    """

    horizon: int = 96
    loss: Loss = "mse"
    levels: tuple[float, ...] = (0.1, 0.5, 0.9)

    def __post_init__(self) -> None:
        whole = isinstance(self.horizon, int) and not isinstance(self.horizon, bool)
        require(
            whole and self.horizon >= 1,
            f"Forecast: horizon={self.horizon!r} is not allowed: a whole number from 1",
        )
        allowed = ", ".join(get_args(Loss))
        require(self.loss in get_args(Loss), f"Forecast: loss={self.loss!r}: one of {allowed}")
        object.__setattr__(self, "levels", _levels(self.levels))

    @property
    def steps_ahead(self) -> int:
        return self.horizon

    def outputs(self, look_back: int) -> int:
        return self.horizon * (len(self.levels) if self.loss == "quantile" else 1)

    def example(self, batch: Batch, draws: Generator | None) -> Example:
        x, target = parts_of(batch, 2)[:2]
        steps = target.shape[1]
        fits = steps == self.horizon or (draws is not None and 1 <= steps < self.horizon)
        if not fits or target.shape[2:] != x.shape[2:]:
            raise AdaptError(
                f"a forecast of {self.horizon} steps of {x.shape[2]} channels needs truths"
                f" [b, {self.horizon}, {x.shape[2]}], got {list(target.shape)}"
            )
        return Example(x, target)

    def answer(self, network: Network, x: Tensor, observed: Tensor | None = None) -> Tensor:
        outputs = each_channel(network, x, observed)
        if self.loss != "quantile":
            return outputs.mT
        by_level = outputs.unflatten(-1, (self.horizon, len(self.levels)))
        answer: Tensor = by_level.sort(-1).values.transpose(1, 2)
        return answer

    def point(self, answer: Tensor) -> Tensor:
        """One number per step and channel of an answer: [b, T, C]."""
        return answer[..., self.levels.index(0.5)] if self.loss == "quantile" else answer

    def loss_of(self, answer: Tensor, example: Example) -> Tensor:
        answer = answer[:, : example.target.shape[1]]
        if self.loss == "mse":
            return F.mse_loss(answer, example.target)
        if self.loss == "smape":
            return smape_loss(answer, example.target)
        levels = torch.tensor(self.levels, dtype=answer.dtype, device=answer.device)
        error = example.target.unsqueeze(-1) - answer
        return torch.maximum(levels * error, (levels - 1) * error).mean()

    def measures(self, answer: Tensor, example: Example) -> Measures:
        truth = example.target
        answer = answer[:, : truth.shape[1]]
        point = self.point(answer)
        found = {"mse": F.mse_loss(point, truth), "mae": F.l1_loss(point, truth)}
        if self.loss == "quantile":
            inside = (truth >= answer[..., 0]) & (truth <= answer[..., -1])
            found["coverage"] = inside.float().mean()
        return Measures(found, len(truth))

    def judged(self, answer: Tensor, example: Example) -> tuple[Tensor, Tensor]:
        return self.point(answer), example.target


@dataclass(frozen=True, kw_only=True)
class Classify(Aim):
    """One of the `classes` for a window of C = `channels` channels, jointly: [b, L, C] -> [b, n].

    The loss is the cross entropy; measured are top-1 accuracy, macro F1 and calibration error.
    Windows stay on the data's scale, where their level may tell classes apart, as in GPT4TS's
    classifier; `rescale` normalises each by itself, for data that is not scaled. A set's rank is
    at most n at the output layer: LoRA's `ranks` sets it there.

    >>> Classify(classes=("sit", "walk"), channels=3).outputs(look_back=96)
    2
    """

    joint: ClassVar[bool] = True
    restores: ClassVar[bool] = False
    classes: tuple[str, ...]
    channels: int = 1
    rescale: bool = False

    def __post_init__(self) -> None:
        plain = isinstance(self.classes, list | tuple) and len(set(self.classes)) >= 2
        require(
            plain and len(set(self.classes)) == len(self.classes),
            f"Classify: classes={self.classes!r} is not allowed: two names or more, each once",
        )
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))
        require(
            isinstance(self.channels, int) and self.channels >= 1,
            f"Classify: channels={self.channels!r} is not allowed: a whole number from 1",
        )

    @property
    def width(self) -> int:
        return self.channels

    @property
    def rescales(self) -> bool:
        return self.rescale

    def misfit(self, data: object) -> str | None:
        found = tuple(getattr(data, "classes", self.classes))
        if found != self.classes:
            return f"the head knows {self.classes}, the data has {found}"
        names = getattr(data, "names", None) or ()
        if names and len(names) != self.channels:
            return f"a patch of the network has {self.channels} channels, the data {len(names)}"
        return None

    def outputs(self, look_back: int) -> int:
        return len(self.classes)

    def example(self, batch: Batch, draws: Generator | None) -> Example:
        x, labels = parts_of(batch, 2)[:2]
        return Example(x, labels)

    def answer(self, network: Network, x: Tensor, observed: Tensor | None = None) -> Tensor:
        logits: Tensor = network(x, observed)
        return logits

    def loss_of(self, answer: Tensor, example: Example) -> Tensor:
        return F.cross_entropy(answer, example.target)

    def measures(self, answer: Tensor, example: Example) -> Measures:
        return Measures({}, len(answer))

    def metric(self, part: str) -> MetricCollection:
        from ..core.images.measured import class_metrics

        return class_metrics(part, len(self.classes))

    def judged(self, answer: Tensor, example: Example) -> tuple[Tensor, Tensor]:
        return answer.softmax(-1), example.target


@dataclass(frozen=True, kw_only=True)
class Reconstruct(Aim):
    """The window itself, [b, L, C] -> [b, L, C]: what it gets wrong is taken for an anomaly.

    The loss and the score of a step are the squared error, the score's averaged over channels. A
    test needs labels [b, L] and reports precision, recall and F1 as they are and with point
    adjustment, see `anomaly.AnomalyMetric`; `share` is the expected share of anomalies, 0 to 1.

    >>> Reconstruct().scores(torch.zeros(1, 2, 2), torch.tensor([[[0.0, 0.0], [1.0, 3.0]]]))
    tensor([[0., 5.]])
    """

    share: float = 0.01

    def __post_init__(self) -> None:
        _require_share("Reconstruct", "share", self.share)

    def outputs(self, look_back: int) -> int:
        return look_back

    def example(self, batch: Batch, draws: Generator | None) -> Example:
        x, *others = parts_of(batch, 1)
        labelled = bool(others) and others[0].shape == x.shape[:2]  # else a future, or a class
        return Example(x, x, labels=others[0] if labelled else None)

    def answer(self, network: Network, x: Tensor, observed: Tensor | None = None) -> Tensor:
        return each_channel(network, x, observed).mT

    def scores(self, answer: Tensor, x: Tensor) -> Tensor:
        """How badly each step was told, the mean over channels: [b, L]."""
        return (answer - x).square().mean(-1)

    def loss_of(self, answer: Tensor, example: Example) -> Tensor:
        return F.mse_loss(answer, example.target)

    def measures(self, answer: Tensor, example: Example) -> Measures:
        return Measures({"mse": self.loss_of(answer, example)}, len(answer))

    def metric(self, part: str) -> AnomalyMetric | None:
        return AnomalyMetric(self.share) if part == "test" else None

    def judged(self, answer: Tensor, example: Example) -> tuple[Tensor, Tensor]:
        if example.labels is None:
            raise AdaptError(
                "a test for anomalies needs labels [b, L] beside the windows: of AnomalyTable, say"
            )
        return self.scores(answer, example.x), example.labels


@dataclass(frozen=True, kw_only=True)
class Impute(Aim):
    """The missing values of a window, [b, L, C] -> [b, L, C], each channel by itself.

    A batch that brings no mask gets one: each value is hidden with probability `share`, drawn anew
    for training, and the same for every validation and test. Normalisation sees the rest only, and
    what is hidden enters as 0. Loss, mse and mae are means over the hidden values. This aim is not
    the paper's (arXiv 2603.29756); GPT4TS (2302.11939) has it, with all channels in one patch.

    >>> x = torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 4, 1)
    >>> seen = torch.tensor([True, True, False, True]).view(1, 4, 1)
    >>> Impute().filled(torch.zeros(1, 4, 1), x, seen).flatten()
    tensor([1., 3., 0., 7.])
    """

    share: float = 0.25

    def __post_init__(self) -> None:
        _require_share("Impute", "share", self.share)

    def outputs(self, look_back: int) -> int:
        return look_back

    def example(self, batch: Batch, draws: Generator | None) -> Example:
        x, *others = parts_of(batch, 1)
        if others and others[0].dtype == torch.bool:
            return Example(x, x, others[0])
        chances = torch.rand(x.shape, generator=draws).to(x.device)  # on the CPU: same bits
        return Example(x, x, chances >= self.share)

    def answer(self, network: Network, x: Tensor, observed: Tensor | None = None) -> Tensor:
        return each_channel(network, x, observed).mT

    def filled(self, answer: Tensor, x: Tensor, observed: Tensor) -> Tensor:
        """x where it is known, else the answer."""
        return torch.where(observed, x, answer)

    def loss_of(self, answer: Tensor, example: Example) -> Tensor:
        return self._hidden_mean((answer - example.target).square(), example)

    def measures(self, answer: Tensor, example: Example) -> Measures:
        assert example.observed is not None, "example() has made it"
        error = answer - example.target
        found = {"mse": error.square(), "mae": error.abs()}
        hidden = int((~example.observed).sum())
        return Measures({k: self._hidden_mean(v, example) for k, v in found.items()}, hidden)

    def _hidden_mean(self, error: Tensor, example: Example) -> Tensor:
        """The mean over what was hidden; 0 if nothing was."""
        assert example.observed is not None, "example() has made it"
        hidden = ~example.observed
        return torch.where(hidden, error, 0).sum() / hidden.sum().clamp_min(1)


def _levels(levels: Sequence[float]) -> tuple[float, ...]:
    """Rising numbers between 0 and 1, of which one is 0.5."""
    found = tuple(levels)
    numbers = all(isinstance(q, float) for q in found)
    rising = numbers and all(a < b for a, b in pairwise((0.0, *found, 1.0)))
    if not rising or 0.5 not in found:
        raise AdaptError(
            f"Forecast: levels={levels!r} is not allowed: rising numbers between 0 and 1 with 0.5"
        )
    return found


def _require_share(aim: str, name: str, value: float) -> None:
    require_finite(aim, **{name: value})
    require(0 < value < 1, f"{aim}: {name}={value} is not allowed: above 0 and below 1")
