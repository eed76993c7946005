"""Numbers that judge forecasts of competitions and detectors of anomalies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from ..core.errors import AdaptError
from .series import Values

_ZERO = 1e-30  # a denominator below it counts as 0; 200 divided by it is still finite in fp32

M4_COUNTS = {
    "Yearly": 23_000,
    "Quarterly": 24_000,
    "Monthly": 48_000,
    "Weekly": 359,
    "Daily": 4_227,
    "Hourly": 414,
}


def smape_loss(forecast: Tensor, truth: Tensor, detached: bool = False) -> Tensor:
    """mean(200 |p - t| / (|p| + |t|)), in per cent from 0 to 200; 0 / 0 counts 0.

    Its gradient is finite, at 0 / 0 it is 0. `detached` takes the denominator for a constant, as
    the M4 code that One-for-All (arXiv 2603.29756) builds on does; the values are the same.

    >>> smape_loss(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0]))
    tensor(50.)
    """
    size = forecast.abs() + truth.abs()
    size = size.detach() if detached else size
    return (200 * (forecast - truth).abs() / size.clamp_min(_ZERO)).mean()


def smape(forecast: Values, truth: Values) -> float:
    """The value of `smape_loss` in double precision, for forecasts [n, T] of n series."""
    error, size = np.abs(forecast - truth), np.abs(forecast) + np.abs(truth)
    return float(np.mean(200 * error / np.maximum(size, _ZERO)))


def naive_error(past: Values, period: int) -> float:
    """mean |y_t - y_{t-m}|: how far the value of a season ago was off, in the past [rows] itself.

    0 for a past that is constant in this sense, or not longer than a season.

    >>> naive_error(np.array([1.0, 2.0, 4.0]), period=1)
    1.5
    """
    return float(np.abs(past[period:] - past[:-period]).mean()) if len(past) > period else 0.0


def mase(forecast: Values, truth: Values, naive_errors: Values) -> float:
    """mean over series of mean|p - t| / naive error: forecasts and truths [n, T], errors [n].

    A series whose naive error is 0 has no MASE and is left out; NaN if none is left.

    >>> mase(np.array([[3.0, 3.0]]), np.array([[4.0, 6.0]]), np.array([4.0]))
    0.5
    """
    known = naive_errors > 0
    if not known.any():
        return float("nan")
    error = np.abs(forecast - truth).mean(axis=1)
    return float(np.mean(error[known] / naive_errors[known]))


def owa(smape: float, mase: float, smape_naive2: float, mase_naive2: float) -> float:
    """Overall weighted average of M4: (sMAPE / Naive2's + MASE / Naive2's) / 2; Naive2 has 1.

    NaN where Naive2 makes no error at all or has no MASE.

    >>> owa(smape=6.0, mase=1.0, smape_naive2=12.0, mase_naive2=2.0)
    0.5
    """
    if not (smape_naive2 > 0 and mase_naive2 > 0):
        return float("nan")
    return (smape / smape_naive2 + mase / mase_naive2) / 2


def aggregated(
    by_frequency: Mapping[str, float], counts: Mapping[str, int] = M4_COUNTS
) -> dict[str, float]:
    """A measure by M4's frequencies as its table shows it: Others together, and the Average.

    Both are weighted by the numbers of series. An OWA is to be taken of aggregated sMAPE and MASE.

    >>> counts = {"Yearly": 6, "Daily": 2, "Hourly": 1}
    >>> aggregated({"Yearly": 9.0, "Daily": 4.0, "Hourly": 1.0}, counts)
    {'Yearly': 9.0, 'Others': 3.0, 'Average': 7.0}
    """
    if unknown := sorted(by_frequency.keys() - counts.keys()):
        raise AdaptError(f"no number of series for {', '.join(unknown)}: {', '.join(counts)}")
    mains = [name for name in by_frequency if name in ("Yearly", "Quarterly", "Monthly")]
    others = [name for name in by_frequency if name not in mains]
    table = {name: by_frequency[name] for name in mains}
    if others:
        table["Others"] = _weighted(by_frequency, counts, others)
    return {**table, "Average": _weighted(by_frequency, counts, [*by_frequency])}


def _weighted(values: Mapping[str, float], counts: Mapping[str, int], names: list[str]) -> float:
    return sum(values[n] * counts[n] for n in names) / sum(counts[n] for n in names)


@dataclass(frozen=True)
class Detection:
    """Shares from 0 to 1; of none found the precision is 0, and so is F1 then."""

    precision: float
    recall: float
    f1: float


def f1(found: Tensor, labels: Tensor) -> Detection:
    """Precision, recall and their harmonic mean over steps: booleans [n], as they are.

    >>> f1(torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])).f1
    0.5
    """
    found, labels = found.bool(), labels.bool()
    hits, named, wanted = (int(x.sum()) for x in (found & labels, found, labels))
    return Detection(
        precision=hits / named if named else 0.0,
        recall=hits / wanted if wanted else 0.0,
        f1=2 * hits / (named + wanted) if named + wanted else 0.0,
    )


def point_adjusted(found: Tensor, labels: Tensor) -> Tensor:
    """`found` with every labelled run whole of which one step was found: booleans [n], in order.

    Published tables are mostly of this kind. It flatters: where runs are long, random scores do
    well (Kim et al., arXiv 2109.05257), so the numbers without it belong beside it.

    >>> point_adjusted(torch.tensor([0, 0, 1, 0, 0]).bool(), torch.tensor([0, 1, 1, 0, 1]).bool())
    tensor([False,  True,  True, False, False])
    """
    found, labels = found.bool(), labels.bool()
    begins = labels & ~torch.cat([labels.new_zeros(1), labels[:-1]])
    run = begins.cumsum(0) * labels  # 1 .. number of runs, 0 outside
    hit = torch.zeros(int(begins.sum()) + 1, dtype=torch.bool, device=labels.device)
    hit[run[found & labels]] = True
    return found | (hit[run] & labels)


def anomaly_threshold(train: Tensor, share: float, test: Tensor | None = None) -> float:
    """The score that a share of the training scores lies above: their (1 - share) quantile.

    The published code takes the quantile of training and test scores together: `test` adds those.
    That looks at the test, so it is for comparison only.

    >>> anomaly_threshold(torch.arange(101.0), share=0.05)
    95.0
    """
    if not 0 < share < 1:
        raise AdaptError(f"share={share:g} of anomalies is not allowed: above 0 and below 1")
    scores = [train] if test is None else [train, test]
    # NumPy's, since torch.quantile takes no more than 2^24 numbers.
    every: NDArray[np.float64] = torch.cat([s.flatten() for s in scores]).double().cpu().numpy()
    if not len(every):
        raise AdaptError("no score to take a threshold from")
    return float(np.quantile(every, 1 - share))


@dataclass(frozen=True)
class Areas:
    """Under the receiver operating characteristic, and under precision over recall: no threshold.

    0.5 and the share of anomalies are what random scores get.
    """

    roc: float
    precision_recall: float


def areas(scores: Tensor, labels: Tensor) -> Areas:
    """Areas of scores [n], higher for anomalies, and labels [n]; `AdaptError` without both kinds.

    >>> areas(torch.tensor([0.1, 900.0, 901.0, 0.2]), torch.tensor([0, 0, 1, 0]))
    Areas(roc=1.0, precision_recall=1.0)
    """
    labels = labels.int()
    if len(labels.unique()) < 2:
        raise AdaptError("all steps are of one kind: an area needs anomalies and normal steps")
    # Ranks: torchmetrics takes scores above 1 for logits, and large ones would all become 1.
    ranks = scores.unique(return_inverse=True)[1].double()
    ranks = ranks / ranks.max().clamp_min(1)
    return Areas(float(binary_auroc(ranks, labels)), float(binary_average_precision(ranks, labels)))
