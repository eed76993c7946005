"""Which pictures are for training, validation and test: by patient, by seed, in folds, or few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Generator

from ...core.errors import AdaptError

_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class Division:
    """How pictures that are in no part yet are divided; patients stay whole.

    val_share, test_share: of the patients, drawn by seed; folds: the patients that are not for the
    test in so many groups of nearly one size, of which number `fold` is for validation; images:
    keep so many training pictures, drawn by seed (the low-data protocol, 20 in SALT's smallest
    data set), None keeps all.

    >>> Division(folds=5, fold=5)
    Traceback (most recent call last):
        ...
    polyadapt.core.errors.AdaptError: folds=5, fold=5 is not allowed: from 2, from 0 below
    """

    val_share: float = 0.1
    test_share: float = 0.0
    folds: int | None = None
    fold: int = 0
    images: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, share in (("val_share", self.val_share), ("test_share", self.test_share)):
            if not 0 <= share < 1:
                raise AdaptError(f"{name}={share} is not allowed: from 0, below 1")
        if self.folds is not None and not (self.folds >= 2 and 0 <= self.fold < self.folds):
            raise AdaptError(
                f"folds={self.folds}, fold={self.fold} is not allowed: from 2, from 0 below"
            )
        if self.images is not None and self.images < 1:
            raise AdaptError(f"images={self.images} is not allowed: a whole number from 1")

    def of(self, patients: Sequence[str], told: Sequence[str | None]) -> dict[str, list[int]]:
        """Indices of "train", "val" and "test"; `told` is the part of each picture, if it has one.

        A part that is told is taken as it is. Pictures of no part join the training pictures, from
        which the parts that nobody told are then split off; with folds, a validation part that was
        told joins them, too.
        """
        parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
        for index, part in enumerate(told):
            joins = part is None or (part == "val" and self.folds is not None)
            parts["train" if joins or part is None else part].append(index)
        # Two seeds: else the two splits would follow one order.
        if not parts["test"]:
            self._split(parts, "test", patients, self.test_share, 2 * self.seed + 1)
        if self.folds is not None:
            self._fold(parts, patients)
        elif not parts["val"]:
            self._split(parts, "val", patients, self.val_share, 2 * self.seed)
        parts["train"] = self._few(parts["train"])
        return parts

    def _split(
        self,
        parts: dict[str, list[int]],
        to: str,
        patients: Sequence[str],
        share: float,
        seed: int,
    ) -> None:
        order = _shuffled(sorted({patients[i] for i in parts["train"]}), seed)
        _move(parts, to, patients, order[: round(share * len(order))])

    def _fold(self, parts: dict[str, list[int]], patients: Sequence[str]) -> None:
        order = _shuffled(sorted({patients[i] for i in parts["train"]}), 2 * self.seed)
        if self.folds is not None and len(order) < self.folds:
            raise AdaptError(f"folds={self.folds}: there are only {len(order)} patients to divide")
        _move(parts, "val", patients, order[self.fold :: self.folds])

    def _few(self, train: list[int]) -> list[int]:
        if self.images is None:
            return _required(train)
        if len(train) < self.images:
            raise AdaptError(f"images={self.images}: there are only {len(train)} for training")
        return sorted(_shuffled(train, self.seed)[: self.images])


def _required(train: list[int]) -> list[int]:
    if not train:
        raise AdaptError("no picture is left for training: lower the shares")
    return train


def _move(
    parts: dict[str, list[int]], to: str, patients: Sequence[str], who: Sequence[str]
) -> None:
    chosen = set(who)
    parts[to] = [i for i in parts["train"] if patients[i] in chosen]
    parts["train"] = [i for i in parts["train"] if patients[i] not in chosen]


def _shuffled(items: Sequence[_Item], seed: int) -> list[_Item]:
    order = torch.randperm(len(items), generator=Generator().manual_seed(seed))
    return [items[i] for i in order.tolist()]
