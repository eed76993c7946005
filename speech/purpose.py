"""What noise a set was trained in, as its file says, and the scenarios that follow for a bundle."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..core.errors import AdaptError, StoreError
from ..core.store import read_file
from .decision import Scenario
from .noise import CLEAN, FULL, Convention, convention_named
from .scene_settings import Noise
from .scenes import KINDS, USUAL_SNR

_LEVELS = 4


@dataclass(frozen=True)
class Purpose:
    """Noise categories (none: any) from `low` to `high` dB, by a convention.

    >>> Purpose(("music", "white"), 0.0, 5.0).scenario
    Scenario(category=None, low=0.0, high=5.0)
    """

    categories: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    convention: Convention = FULL
    own_speakers: bool = False

    @property
    def scenario(self) -> Scenario:
        """The set's label in a bundle; training at a single SNR says nothing about a range."""
        category = self.categories[0] if len(self.categories) == 1 else None
        if self.low == self.high:
            return Scenario(category)
        return Scenario(category, self.low, self.high)

    @classmethod
    def of_scenario(cls, scenario: Scenario, convention: Convention = FULL) -> Purpose:
        """That of a set of which a bundle's label alone is known."""
        categories = () if scenario.category is None else (scenario.category,)
        return cls(categories, scenario.low, scenario.high, convention)

    @classmethod
    def from_json(cls, label: Mapping[str, Any]) -> Purpose:
        """A label as `Noise.label` writes it: an open end of the SNR is null, or both.

        >>> Purpose.from_json({"category": "music+pink", "snr_db": [None, 5]}).categories
        ('music', 'pink')
        """
        category, snr = label.get("category"), label.get("snr_db")
        low, high = snr if isinstance(snr, list) else (snr, snr)
        return cls(
            () if category is None else tuple(str(category).split("+")),
            -math.inf if low is None else float(low),
            math.inf if high is None else float(high),
            convention_named(str(label.get("convention", FULL))),
            bool(label.get("own_speakers", False)),
        )


def purpose_of(path: Path) -> Purpose:
    """What the set of a file is for; `AdaptError` where the file has no label."""
    label = read_file(path).extra.get("label")
    if label is None:
        raise AdaptError(
            f"{path} has no label that says which noise it is for: `fit` writes one with noise in "
            "its data, or with model.label"
        )
    try:
        return Purpose.from_json(label)
    except (AdaptError, AttributeError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: its label {label!r} cannot be read: {error}") from error


def noise_for(purposes: Collection[Purpose], folder: str | None = None) -> Noise:
    """The noise that a bundle's selector and cost matrix are about: all that its sets are for.

    Generated, or of the recordings of a `folder`; `own_speakers` if a set was trained so. An end
    of the SNRs that a label leaves open is -5 or 10 dB, or further out if a set is.

    >>> noise = noise_for([Purpose(("music",), 0, 5), Purpose(("music", "pink"), high=20)])
    >>> noise.kinds, noise.low, noise.high
    (['music', 'pink'], -5.0, 20)
    """
    conventions = {str(purpose.convention): None for purpose in purposes}
    if len(conventions) != 1:
        raise AdaptError(
            f"the sets' labels tell SNRs by {' and '.join(conventions) or 'no convention'}: a "
            "bundle needs one convention"
        )
    low, high = _range(purposes)
    return Noise(
        kinds=[category for category in _categories(purposes) if category != CLEAN],
        folder=folder,
        own_speakers=any(purpose.own_speakers for purpose in purposes),
        low=low,
        high=high,
        convention=next(iter(conventions)),
    )


def _categories(purposes: Collection[Purpose]) -> list[str]:
    named = dict.fromkeys(c for purpose in purposes for c in purpose.categories)
    return list(named) or list(KINDS)


def _range(purposes: Collection[Purpose]) -> tuple[float, float]:
    lows, highs = [p.low for p in purposes], [p.high for p in purposes]
    ends = [end for end in (*lows, *highs) if math.isfinite(end)]
    ends += [USUAL_SNR.low] if -math.inf in lows else []
    ends += [USUAL_SNR.high] if math.inf in highs else []
    return min(ends), max(ends)


def scenarios(classes: Sequence[str], purposes: Collection[Purpose]) -> tuple[Scenario, ...]:
    """The columns of the cost matrix: every class, cut at every SNR where one set's range ends.

    The ends of the whole range cut nothing: sets of the same range are told apart by class alone.

    >>> by_snr = [Purpose(("pink",), -5, 3), Purpose(("pink",), -3, 10)]
    >>> print(*scenarios(["pink", "clean"], by_snr), sep="; ")
    pink below -3 dB; pink from -3 to 3 dB; pink above 3 dB; clean
    """
    edges = [-math.inf, *_cuts(purposes), math.inf]
    parts = list(pairwise(edges))
    return tuple(
        Scenario(category, *part)
        for category in classes
        for part in ([(-math.inf, math.inf)] if category == CLEAN else parts)
    )


def levels(purposes: Collection[Purpose]) -> tuple[float, ...]:
    """SNRs to measure at: four over the whole range, and one at least between two cuts.

    >>> levels([Purpose(("pink",), -5, 10)])
    (-5.0, 0.0, 5.0, 10.0)
    >>> levels([Purpose(("pink",), -5, 10), Purpose(("pink",), 6, 8)])
    (-5.0, 0.0, 5.0, 7.0, 10.0)
    """
    low, high = _range(purposes)
    step = (high - low) / (_LEVELS - 1)
    found = {low + i * step for i in range(_LEVELS)}
    for start, end in pairwise([low, *_cuts(purposes), high]):
        if not any(start <= level < end or level == end == high for level in found):
            found.add((start + end) / 2)
    return tuple(sorted(found))


def _cuts(purposes: Collection[Purpose]) -> list[float]:
    low, high = _range(purposes)
    return sorted({e for p in purposes for e in (p.low, p.high) if low < e < high})
