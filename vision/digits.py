"""scikit-learn's handwritten digits (1,797 real 8x8 images), upright or inverted, split by seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from ..core.images.preprocessing import Preprocessing


@dataclass(frozen=True)
class Digits:
    """Labelled digits: grey images of 8x8 pixels and their classes 0 to 9."""

    pixels: np.ndarray
    """[n, 8, 8] uint8."""
    labels: Tensor
    """[n] int64."""

    def images(self) -> list[Image.Image]:
        """The digits as pictures."""
        return [Image.fromarray(pixels) for pixels in self.pixels]

    def prepared(self, wants: Preprocessing) -> Tensor:
        """[n, c, h, w] as a backbone wants it."""
        return torch.stack([wants(image) for image in self.images()])

    def flat(self) -> np.ndarray:
        """[n, 64] from 0 to 1, for classifiers on raw pixels."""
        return self.pixels.reshape(len(self.pixels), -1) / 255.0


def digits(seed: int, inverted: bool = False, labels: int = 300) -> tuple[Digits, Digits]:
    """(train, test): `labels` digits drawn by seed, and all others.

    >>> train, test = digits(seed=0)
    >>> len(train.labels), len(test.labels)
    (300, 1497)
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    if inverted:
        pixels = 255 - pixels
    order = torch.randperm(len(pixels), generator=Generator().manual_seed(seed)).numpy()
    classes = torch.from_numpy(data.target.astype(np.int64))
    train, test = order[:labels], order[labels:]
    return Digits(pixels[train], classes[train]), Digits(pixels[test], classes[test])
