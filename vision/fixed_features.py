"""Converged classifiers on features that do not change: the baselines that an adapter must beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_STRENGTHS = [float(c) for c in np.logspace(-3, 1, 9)]


@dataclass(frozen=True)
class LinearHead:
    """logits = weight f + bias, weight [classes, d], bias [classes]."""

    weight: Tensor
    bias: Tensor
    strength: float
    """The chosen C of the logistic regression."""

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """The share of features [n, d] that the head classifies as labelled."""
        logits = features.double() @ self.weight.double().t() + self.bias.double()
        return float((logits.argmax(1) == labels).double().mean())


def logistic_regression(features: Tensor, labels: Tensor) -> LinearHead:
    """The multinomial logistic regression on standardised features, converged.

    Its C is chosen by 5-fold cross-validation on these labels only; the standardisation is folded
    into the weights, so that the result is a linear head on the features as they are.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    search = GridSearchCV(pipeline, {"logisticregression__C": _STRENGTHS}, cv=5)
    best = search.fit(features.double().numpy(), labels.numpy()).best_estimator_
    scaler, model = best[0], best[1]
    weight = model.coef_ / scaler.scale_
    bias = model.intercept_ - weight @ scaler.mean_
    return LinearHead(
        torch.from_numpy(weight).float(),
        torch.from_numpy(bias).float(),
        float(search.best_params_["logisticregression__C"]),
    )


def pixel_svm_accuracy(
    train: np.ndarray, labels: Tensor, test: np.ndarray, test_labels: Tensor
) -> float:
    """Test accuracy of an RBF support vector machine on raw pixels, C and gamma by 5-fold CV."""
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    grid = {"C": [1, 3, 10, 30], "gamma": [0.01, 0.03, 0.1, 0.3]}
    search = GridSearchCV(SVC(), grid, cv=5).fit(train, labels.numpy())
    return float(search.score(test, test_labels.numpy()))
