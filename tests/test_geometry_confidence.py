"""Scores of confidences: told apart wholly, by half, not at all."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d.confidence_scores import outlier_auc, rank_correlation


def test_the_area_is_the_share_of_pairs_in_the_right_order() -> None:
    weights = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    wrong = torch.tensor([[False, True], [False, True]])
    assert outlier_auc(weights, wrong) == 3 / 4  # 4 > 3, 4 > 1, 2 > 1, but 2 < 3
    assert outlier_auc(-weights, wrong) == 1 / 4
    assert outlier_auc(torch.zeros(2, 2), wrong) == 1 / 2
    with pytest.raises(AdaptError, match="0 of 4 pixels are wrong"):
        outlier_auc(weights, torch.zeros(2, 2, dtype=torch.bool))


def test_the_rank_correlation_is_scipys_with_ties_too() -> None:
    weights, errors = torch.randint(0, 20, (300,)).float(), torch.rand(300)
    errors -= weights / 40
    wanted = float(spearmanr(weights.numpy(), errors.numpy()).statistic)
    assert rank_correlation(weights, errors) == pytest.approx(wanted, abs=1e-9)
    assert wanted < -0.2
    with pytest.raises(AdaptError, match="the same"):
        rank_correlation(torch.ones(3), torch.rand(3))
    with pytest.raises(AdaptError, match=r"weights \[3\] cannot be scored by \[2\]"):
        rank_correlation(torch.rand(3), torch.rand(2))
