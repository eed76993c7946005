"""Self-calibration: a network learns from its own predictions, once these were aligned.

LoRA3D, arXiv 2412.07746. A plain loop and not core's Lightning task: a run takes minutes, starts
from its own labels, is judged before anything is kept, and its rate falls to 1e-5 and not to 0; of
checkpoints, loggers and several processes it would use nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor

from ..core.adapters.lora import LoRA
from ..core.errors import AdaptError
from ..core.recipe import Recipe, require, require_finite
from ..core.sets import AdapterSet, attach
from .alignment import STEPS, Alignment, align
from .diagnosis import Diagnosis, diagnose
from .graph import Complete, Graph
from .labels import Labels, pseudo_labels
from .loss import confidence_loss, distances
from .pointmaps import Pair, PointmapNetwork
from .predictions import Predictions, one_line_if_out_of_memory, predict
from .recordings import divided
from .weights import Calibrated

Tell = Callable[[str, int, int], None]  # what is done, how much of it, of how much
LEAST_VIEWS = 3  # to calibrate on
LEAST_GAIN = 0.01  # of the validation error: less is not told from chance. Our choice
RECIPE = LoRA(rank=16, alpha=16)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The paper's: AdamW, a cosine from 1e-3 to 1e-5, batches of 2, 10 epochs.

    Weight decay is not known to us; torch's 0.01 here. A batch of 2 is a pair in both orders, so
    that an encoder that notices it works once for both (our choice; which pairs the paper puts
    together is not known).
    """

    lr: float = 1e-3
    last_lr: float = 1e-5
    weight_decay: float = 0.01
    batch: int = 2
    epochs: int = 10

    def __post_init__(self) -> None:
        rates = {"lr": self.lr, "last_lr": self.last_lr, "weight_decay": self.weight_decay}
        require_finite("calibration", **rates)
        require(self.lr > 0, f"calibration: lr={self.lr} is not allowed: above 0")
        require(
            0 <= self.last_lr <= self.lr and self.weight_decay >= 0,
            f"calibration: last_lr={self.last_lr} lies from 0 to lr, weight_decay is at least 0",
        )
        require(
            self.batch >= 1 and self.epochs >= 1,
            f"calibration: batch={self.batch} and epochs={self.epochs} are at least 1",
        )


@dataclass(frozen=True, eq=False)
class Survey:
    """What a network says of a scene's images [n, 3, h, w], aligned, and what may come of it."""

    images: Tensor
    predictions: Predictions
    alignment: Alignment
    diagnosis: Diagnosis


def survey(
    network: PointmapNetwork,
    images: Tensor,
    graph: Graph | None = None,
    rule: Calibrated | None = None,
    focals: Tensor | None = None,
    steps: int = STEPS,
    tell: Tell | None = None,
) -> Survey:
    """Ask about all pairs of a graph (None: complete), align the answers and diagnose them.

    Everything runs where the images are. Raises AdaptError for what `predict` and `align` refuse.
    """
    edges = (graph or Complete()).edges(images).to(images.device)
    found = predict(network, images, edges, progress=_of(tell, "pairs asked about"))
    return surveyed(images, found, rule, focals, steps, tell)


def surveyed(
    images: Tensor,
    found: Predictions,
    rule: Calibrated | None = None,
    focals: Tensor | None = None,
    steps: int = STEPS,
    tell: Tell | None = None,
) -> Survey:
    """`survey` from what a network said, so that pairs may be left out before."""
    aligning = (lambda done, of, _: tell("sweeps of alignment", done, of)) if tell else None
    alignment = align(found, rule, steps=steps, focals=focals, progress=aligning)
    return Survey(images, found, alignment, diagnose(found, alignment))


@dataclass(frozen=True, eq=False)
class Calibration:
    """A scene's set, attached and active, or None where it did not help; the error on held-out
    pairs before and after, and the views that these pairs were held out for.
    """

    adapters: AdapterSet | None
    before: float
    after: float
    held_out: tuple[int, ...]

    @property
    def gain(self) -> float:
        """The share of the error that is gone; below 0 where it grew.

        >>> Calibration(None, before=0.5, after=0.25, held_out=(3,)).gain
        0.5
        """
        return 1 - self.after / self.before if self.before > 0 else 0.0

    def __str__(self) -> str:
        views = f"{len(self.held_out)} held-out view{'s' * (len(self.held_out) != 1)}"
        change = f"error on pairs of {views} {self.before:.4f} -> {self.after:.4f}"
        kept = "the base is kept" if self.adapters is None else "the set is kept"
        return f"{change} ({self.gain:+.1%} gain): {kept}"


def calibrate(
    network: PointmapNetwork,
    seen: Survey,
    at: str | Iterable[str],
    *,
    schedule: Schedule | None = None,
    recipe: Recipe = RECIPE,
    labels: Labels | None = None,
    judge: Labels | None = None,
    hold_out: int | None = None,
    name: str = "scene",
    seed: int = 0,
    tell: Tell | None = None,
) -> Calibration:
    """Train a set on the pairs of a scene, and keep it only if it helps on other views.

    `hold_out` views (None: every fifth, at least one), evenly spread, are in no pair that trains.
    On the pairs that hold one of them, the mean distance to `judge` (None: what the alignment of
    the untouched network says) is measured before and after: |X / z - X~ / z~| over the labelled
    pixels. Where less than 1 % of it goes, the set is detached and the base stays as it was.
    `judge` is not the truth: errors that all pairs share are in it. And the base took part in it,
    so it has a small advantage. `labels` for all pairs are the aligned scene's unless given.

    The pairs' order and the adapters' start are drawn from `seed`. Raises AdaptError for too few
    views, no labels, and a loss that is not finite; nothing is attached then.
    """
    edges, schedule = seen.predictions.edges, schedule or Schedule()
    views = len(seen.images)
    apart = held_out_views(views, hold_out)
    labels = pseudo_labels(seen.alignment) if labels is None else labels
    judge = pseudo_labels(seen.alignment) if judge is None else judge
    tests = _labelled((edges[:, :, None] == edges.new_tensor(apart)).any((1, 2)), judge)
    couples = _couples(edges, labels, {*range(views)} - {*apart})
    if not len(tests) or not len(couples):
        which = "held-out views" if len(couples) else "views to calibrate on"
        raise AdaptError(f"no pair of the {which} has a label: nothing overlaps surely there")
    wanted = judge.chosen(tests)
    before = error_of(Pair(*(part[tests] for part in seen.predictions.pair)), wanted)
    chance = Generator().manual_seed(seed)
    made = attach(network, recipe, at, name, generator=chance)
    try:
        _train(network, made, seen, labels, couples, schedule, chance, tell)
        network.eval()
        asked = predict(network, seen.images, edges[tests], progress=_of(tell, "pairs validated"))
    except BaseException:
        made.detach()
        raise
    found = Calibration(made, before, error_of(asked.pair, wanted), tuple(apart))
    if found.gain >= LEAST_GAIN:
        return found
    made.detach()
    return Calibration(None, found.before, found.after, found.held_out)


def held_out_views(views: int, many: int | None = None) -> list[int]:
    """Which views to hold out: `many` of them (None: one in five, at least one), evenly spread.

    Raises AdaptError where fewer than three would be left.

    >>> held_out_views(5), held_out_views(12)
    ([2], [3, 9])
    """
    many = max(1, views // 5) if many is None else many
    if many < 1 or views - many < LEAST_VIEWS:
        raise AdaptError(
            f"{views} images with {many} held out to validate on: calibration needs at least"
            f" {LEAST_VIEWS} images to learn from and 1 to validate on"
        )
    return divided(views, views - many, many)[1]


def error_of(pair: Pair, labels: Labels) -> float:
    """The mean of |X / z - X~ / z~| over all labelled pixels of both views; see `loss`."""
    one, two = distances(pair, labels)
    many = labels.valid1.sum() + labels.valid2.sum()
    return float((one.sum() + two.sum()) / many)


def shuffled(labels: Labels, seed: int = 0) -> Labels:
    """The control: every pair gets the labels of another pair."""
    order = torch.randperm(len(labels.points1), generator=Generator().manual_seed(seed))
    others = torch.empty_like(order)
    others[order] = order.roll(1)
    return labels.chosen(others.to(labels.points1.device))


def _labelled(chosen: Tensor, labels: Labels) -> Tensor:
    """The numbers of the chosen pairs that have any label."""
    some = labels.valid1.flatten(1).any(1) | labels.valid2.flatten(1).any(1)
    return (chosen & some).nonzero()[:, 0]


def _couples(edges: Tensor, labels: Labels, views: set[int]) -> Tensor:
    """The numbers of pairs (i, j) and (j, i) among `views` that both have labels, [c, 2]."""
    every = torch.ones(len(edges), dtype=torch.bool, device=edges.device)
    known = {*_labelled(every, labels).tolist()}
    number = {(i, j): k for k, (i, j) in enumerate(edges.tolist()) if k in known}
    both = [
        (k, number[j, i])
        for (i, j), k in number.items()
        if i < j and (j, i) in number and {i, j} <= views
    ]
    return torch.tensor(both, dtype=torch.long).view(-1, 2)


def _train(
    network: PointmapNetwork,
    adapters: AdapterSet,
    seen: Survey,
    labels: Labels,
    couples: Tensor,
    schedule: Schedule,
    chance: Generator,
    tell: Tell | None,
) -> None:
    """In evaluation mode: the base's dropout and statistics stay what they are."""
    network.eval()
    total = schedule.epochs * math.ceil(couples.numel() / schedule.batch)
    groups = adapters.parameter_groups(schedule.lr, schedule.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, schedule.last_lr)
    height, width = seen.images.shape[-2:]
    doing = f"training on {schedule.batch} pairs of {width}x{height} pixels at a time"
    with one_line_if_out_of_memory(doing, "take a smaller batch, or smaller images"):
        step = 0
        for _ in range(schedule.epochs):
            order = couples[torch.randperm(len(couples), generator=chance)].flatten()
            for chosen in order.split(schedule.batch):
                loss = _loss(network, seen, labels, chosen.to(seen.images.device))
                step += 1
                if not loss.isfinite():
                    raise AdaptError(
                        f"step {step}: the loss is {float(loss.detach())}; lower lr (now"
                        f" {schedule.lr:g})"
                    )
                (loss + adapters.penalty()).backward()
                optimizer.step()
                adapters.after_step(step, total)
                falling.step()
                optimizer.zero_grad()
                if tell:
                    tell("steps of calibration", step, total)


def _loss(network: PointmapNetwork, seen: Survey, labels: Labels, chosen: Tensor) -> Tensor:
    first, second = seen.predictions.edges[chosen].unbind(1)
    pair: Pair = network(seen.images[first], seen.images[second])
    return confidence_loss(pair, labels.chosen(chosen))


def _of(tell: Tell | None, what: str) -> Callable[[int, int], None] | None:
    return partial(tell, what) if tell else None
