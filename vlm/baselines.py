"""What few-shot adaptation must beat: classifiers on the features of a frozen image-text model.

Features are L2-normalised: images f [n, d], one text feature per class g [c, d].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..core.errors import AdaptError

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

SCALE = 100.0
_STRENGTHS = (0.01, 0.0316, 0.1, 0.316, 1.0, 3.16, 10.0)
_ONE_SHOT_STRENGTH = 0.316  # of CLIP's own linear probe; one image cannot be cross-validated


def zero_shot(images: Tensor, classes: Tensor, scale: float = SCALE) -> Tensor:
    """Logits [n, c] = scale f g^T: the classifier that no image of the classes has trained.

    >>> zero_shot(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.8], [1.0, 0.0]])).tolist()
    [[50.0, 100.0]]
    """
    return scale * images @ classes.t()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of rows whose largest logit is the label's.

    >>> accuracy(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1]))
    0.5
    """
    return float((logits.argmax(1) == labels).double().mean())


# Linear probe


@dataclass(frozen=True)
class LinearProbe:
    """logits = f weight^T + bias; weight [c, d], bias [c]."""

    weight: Tensor
    bias: Tensor
    strength: float
    """The C of the logistic regression: the inverse of its weight decay."""

    def logits(self, images: Tensor) -> Tensor:
        """Features [n, d] -> logits [n, c]."""
        return images @ self.weight.t() + self.bias


def linear_probe(images: Tensor, labels: Tensor) -> LinearProbe:
    """Multinomial logistic regression on sqrt(d) f, converged (scikit-learn).

    The factor gives entries of size 1, as CLIP's own probe has them (arXiv 2103.00020); a deviation
    per entry would be noise where there are two images. C is chosen from seven by stratified
    cross-validation on these images alone, in min(5, K) folds for K images of the smallest class;
    with one image a class it is 0.316, as in CLIP's. CoOp's probe chooses with further validation
    images, so its numbers are not these. Raises `AdaptError` unless the labels are 0 to c - 1, with
    c at least 2.

    >>> probe = linear_probe(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    >>> probe.logits(torch.tensor([[0.1, 0.9], [0.9, 0.1]])).argmax(1).tolist(), probe.strength
    ([0, 1], 0.316)
    """
    folds = min(5, int(_counts(labels).min()))
    factor = images.shape[1] ** 0.5
    model = _regression(factor * images.double().numpy(), labels.numpy(), folds)
    weight, bias = factor * model.coef_, model.intercept_
    if len(weight) == 1:  # of two classes, scikit-learn gives the log odds
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return LinearProbe(torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), model.C)


def _regression(x: np.ndarray, labels: np.ndarray, folds: int) -> LogisticRegression:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    if folds < 2:
        return LogisticRegression(C=_ONE_SHOT_STRENGTH, max_iter=5000).fit(x, labels)
    search = GridSearchCV(LogisticRegression(max_iter=5000), {"C": _STRENGTHS}, cv=folds)
    return search.fit(x, labels).best_estimator_


def _counts(labels: Tensor) -> Tensor:
    counts = torch.bincount(labels)
    if len(counts) < 2 or not bool(counts.all()):
        raise AdaptError(f"{counts.tolist()} images of the classes: wanted are two classes or more")
    return counts


# Tip-Adapter


@dataclass(frozen=True)
class TipAdapter:
    """Zero-shot logits and the votes of the training images (arXiv 2111.03930).

    logits = alpha phi(f keys^T) values + scale f g^T, phi(x) = exp(-beta (1 - x)); keys [n, d] are
    the training images' features, values [n, c] their labels, one-hot. alpha = 1 and beta = 5.5 are
    what the authors' code starts from; it then searches both on validation images, of which the
    few-shot protocol here has none, so they stay: numbers of papers are not these.

    >>> keys, classes = torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> cache = TipAdapter.of(keys, torch.tensor([0, 1]), classes, alpha=2.0, scale=0.0)
    >>> cache.logits(torch.tensor([[1.0, 0.0]]))[0, 0].item()  # the first key's vote: exp(0)
    2.0
    """

    keys: Tensor
    values: Tensor
    classes: Tensor
    alpha: float = 1.0
    beta: float = 5.5
    scale: float = SCALE

    @staticmethod
    def of(
        images: Tensor,
        labels: Tensor,
        classes: Tensor,
        alpha: float = 1.0,
        beta: float = 5.5,
        scale: float = SCALE,
    ) -> TipAdapter:
        """The cache of training images [n, d] with labels [n]; nothing is trained."""
        if min(alpha, beta) < 0:
            raise AdaptError(f"alpha={alpha}, beta={beta}: both from 0")
        values = F.one_hot(labels, len(classes)).to(images.dtype)
        return TipAdapter(images, values, classes, alpha, beta, scale)

    def logits(self, images: Tensor) -> Tensor:
        """Features [n, d] -> logits [n, c]."""
        return self.scale * images @ self.classes.t() + self.alpha * self.votes(images)

    def votes(self, images: Tensor) -> Tensor:
        """phi(f keys^T) values, [n, c]."""
        return torch.exp(-self.beta * (1 - images @ self.keys.t())) @ self.values

    def fine_tuned(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        epochs: int = 20,
        lr: float = 1e-3,
        batch_size: int = 256,
        seed: int = 0,
    ) -> TipAdapter:
        """Tip-Adapter-F: the keys trained by cross-entropy on `images`, the values kept.

        Images [n, d], or [v, n, d] with v views of each: an epoch sees one of them, in turn. AdamW
        with the authors' eps 1e-4, a cosine to 0 over all steps, batches shuffled by `seed`.
        """
        if epochs < 1 or batch_size < 1:
            raise AdaptError(f"epochs={epochs}, batch_size={batch_size}: both from 1")
        tuned = replace(self, keys=self.keys.clone().requires_grad_())
        optimizer = torch.optim.AdamW([tuned.keys], lr=lr, eps=1e-4)
        views = images if images.ndim == 3 else images[None]
        steps = epochs * -(-len(labels) // batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = Generator().manual_seed(seed)
        for epoch in range(epochs):
            seen = views[epoch % len(views)]
            for batch in torch.randperm(len(labels), generator=generator).split(batch_size):
                loss = F.cross_entropy(tuned.logits(seen[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return replace(tuned, keys=tuned.keys.detach())
