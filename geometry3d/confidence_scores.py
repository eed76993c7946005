"""How well confidences or weights tell right points from wrong ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..core.errors import AdaptError


def outlier_auc(weights: Tensor, wrong: Tensor) -> float:
    """The chance that a wrong pixel has a lower weight than a right one; equal ones count half.

    weights [...], wrong [...] bool. 1: they are told apart wholly, 0.5: not at all (the area under
    the ROC curve, Mann-Whitney's statistic).

    Raises AdaptError where the shapes differ, or none or all are wrong.

    >>> import torch
    >>> wrong = torch.tensor([False, False, True])
    >>> outlier_auc(torch.tensor([3.0, 1, 1]), wrong)
    0.75
    """
    from scipy.stats import rankdata

    w, bad = _flat(weights, wrong)
    many, few = int((~bad).sum()), int(bad.sum())
    if min(many, few) == 0:
        raise AdaptError(f"{few} of {many + few} pixels are wrong: some have to be, and some not")
    ranks = rankdata(w)[~bad].sum()
    return float((ranks - many * (many + 1) / 2) / (many * few))


def rank_correlation(weights: Tensor, errors: Tensor) -> float:
    """Spearman's: -1 where a larger weight always means a smaller error, 0 where it says nothing.

    Raises AdaptError where the shapes differ or all weights or all errors are the same.

    >>> import torch
    >>> rank_correlation(torch.tensor([3.0, 2, 1]), torch.tensor([0.1, 0.2, 9.0]))
    -1.0
    """
    from scipy.stats import rankdata

    w, e = (rankdata(x) for x in _flat(weights, errors))
    w, e = w - w.mean(), e - e.mean()
    length = np.sqrt((w * w).sum() * (e * e).sum())
    if not length > 0:
        raise AdaptError("all weights or all errors are the same: they have no order to compare")
    return round(float((w * e).sum() / length), 12)


def _flat(*tensors: Tensor) -> list[np.ndarray[Any, Any]]:
    if tensors[0].shape != tensors[1].shape:
        one, two = (list(tensor.shape) for tensor in tensors)
        raise AdaptError(f"weights {one} cannot be scored by {two}: they have one shape")
    return [tensor.detach().cpu().flatten().numpy() for tensor in tensors]
