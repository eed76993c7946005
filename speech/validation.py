"""What the validation data say of the sets: the cost matrix, and whether choosing among them pays.

WER is a ratio: errors of all utterances over words of all utterances, so both are resampled
together. The bootstrap is paired: both ways of transcribing are scored on the same draw.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from ..core.errors import AdaptError
from .decision import NONE, Costs, Interval, Scenario
from .noise import Label
from .scenes import seeded

_BLOCK = 100
Errors = Mapping[str, Sequence[float]]
"""Set (and "none") -> word errors of every utterance."""


def costs_of(
    errors: Errors,
    words: Sequence[float],
    labels: Sequence[Label],
    scenarios: Sequence[Scenario],
    general: str = NONE,
) -> Costs:
    """The cost matrix of validation utterances: 100 times errors over words, by set and scenario.

    >>> labels = [Label("x", 0.0), Label("x", 5.0), Label("y", 0.0)]
    >>> columns = [Scenario("x"), Scenario("y")]
    >>> costs_of({"none": [1, 1, 2], "a": [0, 1, 4]}, [2, 2, 4], labels, columns).wer
    ((50.0, 50.0), (25.0, 100.0))
    """
    _check_lengths({**errors, "words": words, "labels": labels})

    def row(found: Sequence[float]) -> tuple[float, ...]:
        return tuple(_wer(found, words, labels, scenario) for scenario in scenarios)

    rows = tuple(map(row, errors.values()))
    return Costs(tuple(errors), tuple(scenarios), rows, general)


def _wer(
    errors: Sequence[float], words: Sequence[float], labels: Sequence[Label], scenario: Scenario
) -> float:
    inside = [i for i, label in enumerate(labels) if scenario.holds(label)]
    total = sum(words[i] for i in inside)
    if not total:
        raise AdaptError(f"no validation word under '{scenario}': its column cannot be measured")
    return 100 * sum(errors[i] for i in inside) / total


def gain_of(
    costs: Costs,
    errors: Errors,
    words: Sequence[float],
    chosen: Sequence[str | None],
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """WER of the best fixed set minus that of the chosen ones, with its interval.

    Above zero: choosing is worthwhile. `chosen` is the set of each utterance, None for the base.
    """
    picked = [name or NONE for name in chosen]
    _check_lengths({**errors, "words": words, "choices": picked})
    if odd := {*picked} - {*errors}:
        raise AdaptError(f"no errors were measured with {', '.join(sorted(odd))}")
    selected = [errors[name][i] for i, name in enumerate(picked)]
    return paired_bootstrap(errors[costs.best_fixed()], selected, words, groups)


def best_edge(low: Sequence[float], high: Sequence[float], snr_db: Sequence[float]) -> float:
    """The SNR below which the set `low` should be used and above which the set `high`.

    That with the fewest word errors, given both sets' errors on every utterance and the selector's
    estimate of its SNR in dB. Infinite where one set is better throughout.

    >>> best_edge([0, 0, 3], [2, 1, 0], [-5.0, 0.0, 10.0])
    5.0
    """
    _check_lengths({"low": low, "high": high, "estimates": snr_db})
    rows = sorted(zip(snr_db, low, high, strict=True))
    ends = [-math.inf, *(snr for snr, _, _ in rows), math.inf]
    totals = [sum(high)]  # edge before the first utterance, after the first, ...
    for _, below, above in rows:
        totals.append(totals[-1] + below - above)
    places = [i for i in range(len(totals)) if ends[i] < ends[i + 1]]  # equal ones stay together
    best = min(places, key=totals.__getitem__)
    return (ends[best] + ends[best + 1]) / 2


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    words: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    draws: int = 4000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """WER of the first minus WER of the second, in points, with a percentile interval.

    Utterances are resampled, or whole `groups` (speakers, folds) where utterances within one are
    not independent; a handful of groups gives a coarse interval.

    >>> print(paired_bootstrap([2, 2, 2, 2], [1, 1, 1, 1], [10, 10, 10, 10]))
    10.0 points (10.0 to 10.0)
    """
    _check_lengths({"first": first, "second": second, "words": words, "groups": groups or words})
    table = torch.tensor([first, second, words], dtype=torch.float64)
    if groups is not None:
        table = _summed(table, groups)
    count = table.shape[1]
    if count < 2 or float(table[2].sum()) <= 0:
        raise AdaptError(f"a bootstrap over {count} utterances or groups: at least 2, with words")
    generator, blocks = seeded("bootstrap", seed), []
    for _ in range(0, draws, _BLOCK):  # all draws at once would need draws x utterances numbers
        rows = torch.randint(count, (_BLOCK, count), generator=generator)
        blocks.append(table[:, rows].sum(-1))
    drawn = torch.cat(blocks, 1)
    drawn = drawn[:, drawn[2] > 0]
    found = _difference(drawn).quantile(torch.tensor([0.5 - level / 2, 0.5 + level / 2]).double())
    return Interval(float(_difference(table.sum(1))), float(found[0]), float(found[1]))


def _difference(sums: Tensor) -> Tensor:
    return 100 * (sums[0] - sums[1]) / sums[2]


def _summed(table: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """[3, utterances] -> [3, groups]."""
    places = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([places[group] for group in groups])
    return torch.zeros(3, len(places), dtype=table.dtype).index_add_(1, index, table)


def _check_lengths(columns: Mapping[str, Sequence[object]]) -> None:
    lengths = {name: len(column) for name, column in columns.items()}
    if len({*lengths.values()}) > 1:
        raise AdaptError(f"utterances must be the same for all, found {lengths}")
