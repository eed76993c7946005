"""How well scores find anomalies: one threshold, and F1 with and without point adjustment."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from .metrics import anomaly_threshold, areas, f1, point_adjusted


class AnomalyMetric(Metric):
    """F1 of the steps whose score is above a threshold, in four readings, each from 0 to 1.

    `f1`: the threshold is the (1 - share) quantile of the training scores, the steps are counted as
    they are. `f1_adjusted`: a labelled run of which one step is found counts as found whole.
    `f1_joint`, `f1_joint_adjusted`: the quantile is over training and test scores together, which
    looks at the test; the last is what arXiv 2603.29756 reports, by its code. Beside them stand
    the areas under the two curves that need no threshold, see `areas`. Batches have to come in the
    order of time.

    >>> metric = AnomalyMetric(share=0.5)
    >>> metric.learn(torch.tensor([[0.0, 0.1]]))
    >>> metric.update(torch.tensor([[0.0, 0.5, 0.0]]), torch.tensor([[0, 1, 1]]))
    >>> found = metric.compute()
    >>> [round(float(found[f"test_{name}"]), 2) for name in ("recall", "f1", "f1_adjusted")]
    [0.5, 0.67, 1.0]
    """

    full_state_update = False
    seen: list[Tensor]
    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        for state in ("seen", "scores", "labels"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def learn(self, scores: Tensor) -> None:
        """Take scores [b, L] of training windows."""
        self.seen.append(scores.flatten())

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Take scores and labels [b, L] of test windows; steps labelled below 0 do not count."""
        counts = labels >= 0
        self.scores.append(scores[counts])
        self.labels.append(labels[counts].bool())

    def compute(self) -> dict[str, Tensor]:
        """The readings by name, with precision and recall of the plain one, and thresholds."""
        seen, scores, labels = (torch.cat(list(s)) for s in (self.seen, self.scores, self.labels))
        found: dict[str, float] = {}
        for name, test in (("", None), ("_joint", scores)):
            threshold = anomaly_threshold(seen, self.share, test)
            flagged = scores > threshold
            plain, adjusted = f1(flagged, labels), f1(point_adjusted(flagged, labels), labels)
            if not name:
                found |= {"precision": plain.precision, "recall": plain.recall}
            found |= {f"f1{name}": plain.f1, f"f1{name}_adjusted": adjusted.f1}
            found[f"threshold{name}"] = threshold
        if labels.any() and not labels.all():
            under = areas(scores, labels)
            found |= {"area_roc": under.roc, "area_precision_recall": under.precision_recall}
        return {f"test_{name}": torch.tensor(value) for name, value in found.items()}
