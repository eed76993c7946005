"""Which adapter set to use: the one with the least expected WER, not that of the likeliest noise.

With p(c) the probability of scenario c and W[a, c] the validation WER of set a there, the choice
is argmin_a sum_c p(c) W[a, c]. A specialist can be catastrophic on other noise (arXiv 2502.01709,
table I), so a likelier scenario may lose against a costlier mistake. The frozen base, called
"none", and a set for all noise are candidates like any other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import AdaptError
from .noise import Label

NONE = "none"


@dataclass(frozen=True)
class Scenario:
    """A noise category, a range of SNRs, or both; neither: any sound.

    >>> print(Scenario("babble"), Scenario("babble", high=5), Scenario(low=5), Scenario())
    babble babble below 5 dB any above 5 dB any
    """

    category: str | None = None
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise AdaptError(
                f"a scenario from {self.low} to {self.high} dB: low must be below high"
            )

    def __str__(self) -> str:
        name = self.category or "any"
        if math.isinf(self.low) and math.isinf(self.high):
            return name
        if math.isinf(self.low) or math.isinf(self.high):
            below = math.isinf(self.low)
            return f"{name} below {self.high:g} dB" if below else f"{name} above {self.low:g} dB"
        return f"{name} from {self.low:g} to {self.high:g} dB"

    def share(self, snr_db: float | None, sigma: float) -> float:
        """How likely an SNR in this range is, given an estimate with a normal error of sigma dB.

        >>> Scenario(high=5).share(4.9, 0), round(Scenario(high=5).share(5.0, 3.0), 3)
        (1.0, 0.5)
        """
        if math.isinf(self.low) and math.isinf(self.high):
            return 1.0
        if snr_db is None:
            raise AdaptError(f"the scenario '{self}' needs an estimate of the SNR")
        return _below(self.high - snr_db, sigma) - _below(self.low - snr_db, sigma)

    def holds(self, label: Label) -> bool:
        """The mixture belongs here; its SNR may be the lower end and not the upper one."""
        known = self.category in (None, label.category)
        return known and (
            self.low <= label.snr_db < self.high or self.high == math.inf == label.snr_db
        )

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity: an open end is null."""
        ends = [None if math.isinf(end) else float(end) for end in (self.low, self.high)]
        return {"category": self.category, "snr_db": ends}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Scenario:
        """The inverse of `to_json`."""
        low, high = value["snr_db"]
        category = value["category"]
        return cls(
            None if category is None else str(category),
            -math.inf if low is None else float(low),
            math.inf if high is None else float(high),
        )


def _below(distance: float, sigma: float) -> float:
    if sigma == 0 or math.isinf(distance):
        return float(distance > 0)
    return 0.5 * (1 + math.erf(distance / (sigma * math.sqrt(2))))


@dataclass(frozen=True)
class Interval:
    """A difference of WERs in points and the bounds that the bootstrap gave.

    >>> print(Interval(0.3, -0.5, 1.1), Interval(0.3, -0.5, 1.1).above_zero)
    0.3 points (-0.5 to 1.1) False
    """

    value: float
    low: float
    high: float

    @property
    def above_zero(self) -> bool:
        """The data show a gain."""
        return self.low > 0

    def __str__(self) -> str:
        return f"{self.value:.1f} points ({self.low:.1f} to {self.high:.1f})"


@dataclass(frozen=True)
class Costs:
    """Validation WER in per cent of every set (rows) under every scenario (columns).

    The rows must name the frozen base "none"; `general` is the row that unknown or unsure sound
    falls back to.

    >>> costs = Costs(("none", "a"), (Scenario("x"), Scenario("y")), ((10, 10), (4, 20)))
    >>> costs.expected((0.5, 0.5))
    {'none': 10.0, 'a': 12.0}
    """

    sets: tuple[str, ...]
    scenarios: tuple[Scenario, ...]
    wer: tuple[tuple[float, ...], ...]
    general: str = NONE

    def __post_init__(self) -> None:
        shape = [len(row) for row in self.wer]
        if shape != [len(self.scenarios)] * len(self.sets) or not self.scenarios:
            raise AdaptError(
                f"the cost matrix has rows of {shape} numbers, expected {len(self.sets)} sets x "
                f"{len(self.scenarios)} scenarios"
            )
        if not all(0 <= wer < math.inf for row in self.wer for wer in row):
            raise AdaptError("the cost matrix holds a WER that is negative, NaN or infinite")
        if len({*self.sets}) < len(self.sets) or NONE not in self.sets:
            raise AdaptError(f"the rows {list(self.sets)} must differ, and one must be '{NONE}'")
        if self.general not in self.sets:
            raise AdaptError(
                f"the general set {self.general!r} has no row; there are {', '.join(self.sets)}"
            )
        _check_cover(self.scenarios)

    def expected(self, probabilities: Sequence[float]) -> dict[str, float]:
        """Expected WER of every set: W p."""
        return {
            name: math.fsum(w * p for w, p in zip(row, probabilities, strict=True))
            for name, row in zip(self.sets, self.wer, strict=True)
        }

    def best_fixed(self, among: Collection[str] | None = None) -> str:
        """The set with the least WER on the average of the scenarios."""
        even = [1 / len(self.scenarios)] * len(self.scenarios)
        return self.least(self.expected(even), among)

    @property
    def by_level(self) -> bool:
        """Some columns are about a range of SNRs, so an estimate of it is needed."""
        return any(math.isfinite(end) for s in self.scenarios for end in (s.low, s.high))

    def column(self, label: Label) -> int:
        """The scenario that a mixture belongs to."""
        for i, scenario in enumerate(self.scenarios):
            if scenario.holds(label):
                return i
        raise AdaptError(f"no column for '{label}': {', '.join(map(str, self.scenarios))}")

    def least(self, expected: Mapping[str, float], among: Collection[str] | None = None) -> str:
        """The cheapest of these sets; where they tie, the general set, then the base."""
        allowed = [s for s in self.sets if among is None or s in among or s == NONE]
        return min(allowed, key=lambda s: (expected[s], s != self.general, s != NONE))


def _check_cover(scenarios: Sequence[Scenario]) -> None:
    """Every SNR of every category is in exactly one scenario, so that probabilities sum to 1."""
    by_category: dict[str | None, list[Scenario]] = {}
    for scenario in scenarios:
        by_category.setdefault(scenario.category, []).append(scenario)
    if None in by_category and len(by_category) > 1:
        raise AdaptError("the scenarios name categories in some columns and none in others")
    for category, found in by_category.items():
        found.sort(key=lambda scenario: scenario.low)
        lows = [scenario.low for scenario in found] + [math.inf]
        highs = [-math.inf] + [scenario.high for scenario in found]
        if lows != highs:
            raise AdaptError(
                f"the SNR ranges of {category or 'the columns'} leave a gap or overlap: "
                f"{', '.join(map(str, found))}"
            )


def break_even(costs: Costs, one: str, other: str, scenario: int, against: int) -> float:
    """The probability of `scenario` (else `against`) at which two sets cost the same.

    NaN where they never do.
    """
    a, b = (costs.wer[costs.sets.index(name)] for name in (one, other))
    here, there = a[scenario] - b[scenario], a[against] - b[against]
    found = there / (there - here) if there != here else math.nan
    return found if 0 <= found <= 1 else math.nan


def predicted(costs: Costs, confusion: Sequence[Sequence[float]]) -> list[float]:
    """WER of a selection in every scenario: choices[scenario][set], as counts or shares, times W.

    It tells what a selector's mistakes cost before anything is transcribed.
    """
    if any(len(row) != len(costs.sets) for row in confusion) or len(confusion) != len(
        costs.scenarios
    ):
        raise AdaptError(f"{len(confusion)} rows of choices do not fit the cost matrix")
    return [
        math.fsum(n * costs.wer[s][c] for s, n in enumerate(row)) / math.fsum(row)
        for c, row in enumerate(confusion)
    ]


@dataclass(frozen=True)
class Choice:
    """What was chosen for a clip, and on what grounds."""

    name: str | None
    """The set, or None for the frozen base."""
    why: str
    probabilities: dict[str, float] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)
    snr_db: float | None = None

    @property
    def scenario(self) -> str:
        """The likeliest one; empty where nothing was heard."""
        return max(self.probabilities, key=self.probabilities.__getitem__, default="")


@dataclass(frozen=True)
class Decision:
    """The cost matrix and how far the selector is trusted.

    `classes`: the order of the selector's probabilities. `sigma`: its SNR error in dB, 0 for hard
    bins. `threshold`: below this probability of the likeliest class the general set is taken.
    `gain`: validation WER of the best fixed set minus that of the selection, if it was measured.
    """

    costs: Costs
    classes: tuple[str, ...]
    sigma: float = 0.0
    threshold: float = 0.0
    gain: Interval | None = None

    def __post_init__(self) -> None:
        columns = {scenario.category for scenario in self.costs.scenarios}
        if columns not in ({None}, {*self.classes}):
            raise AdaptError(
                f"the cost matrix is about {sorted(map(str, columns))}, the selector knows "
                f"{list(self.classes)}: every class needs its columns, and no other has any"
            )
        if not (0 <= self.threshold <= 1 and 0 <= self.sigma < math.inf):
            raise AdaptError(
                f"threshold {self.threshold} and sigma {self.sigma} are not allowed: 0 to 1, and "
                "0 or more dB"
            )

    def choose(
        self,
        classes: Sequence[float],
        snr_db: float | None = None,
        among: Collection[str] | None = None,
    ) -> Choice:
        """The set with the least expected WER for the probabilities of the classes.

        `among` are the sets at hand; the base is always one of them.
        """
        p = self._scenarios(classes, snr_db)
        expected = self.costs.expected(list(p.values()))
        expected = {s: w for s, w in expected.items() if among is None or s in among or s == NONE}
        if classes and max(classes) < self.threshold:
            fallback = self.fallback(among)
            why = f"unsure: the likeliest class has {max(classes):.2f}, below {self.threshold:g}"
            return Choice(fallback, why, p, expected, snr_db)
        name = self.costs.least(expected, among)
        return Choice(_or_none(name), "least expected WER", p, expected, snr_db)

    def choose_for(
        self, category: str, snr_db: float | None = None, among: Collection[str] | None = None
    ) -> Choice:
        """The choice when the noise is known; a category that is not known falls back."""
        if category not in self.classes:
            why = f"unknown noise {category!r}; known: {', '.join(self.classes)}"
            return Choice(self.fallback(among), why, snr_db=snr_db)
        return self.choose([float(name == category) for name in self.classes], snr_db, among)

    def fallback(self, among: Collection[str] | None = None) -> str | None:
        """The general set if it is at hand, else the frozen base."""
        general = self.costs.general
        return _or_none(general if among is None or general in among else NONE)

    def _scenarios(self, classes: Sequence[float], snr_db: float | None) -> dict[str, float]:
        p = dict(zip(self.classes, classes, strict=True))
        return {
            str(s): (1.0 if s.category is None else p[s.category]) * s.share(snr_db, self.sigma)
            for s in self.costs.scenarios
        }

    def advice(self) -> str:
        """Whether choosing is worthwhile, by the validation data."""
        best = self.costs.best_fixed()
        if self.gain is None:
            return "whether choosing is worthwhile was not measured"
        gains = f"against '{best}' for everything it gains {self.gain}"
        if self.gain.above_zero:
            return f"choosing is worthwhile: {gains}"
        why = "it loses" if self.gain.high < 0 else "an interval that reaches zero"
        return f"choosing is not worthwhile here: {gains}, {why}"


def _or_none(name: str) -> str | None:
    return None if name == NONE else name
