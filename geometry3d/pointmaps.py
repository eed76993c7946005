"""What a pointmap network answers about two images, and what every such network is.

Conventions of this folder: images [b, 3, h, w] in 0..1 (RGB). Column i has its centre at
u = i + 0.5, row j at v = j + 0.5; the principal point is (w / 2, h / 2). Cameras look along +z, x
to the right and y down (OpenCV); poses are camera-to-world. A pointmap X [h, w, 3] gives every
pixel its 3D point; its confidence C [h, w] is above 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn


class Pair(NamedTuple):
    """What a network says of a batch of two images; both pointmaps in the first camera's frame."""

    points1: Tensor  # [b, h, w, 3]
    confidence1: Tensor  # [b, h, w]
    points2: Tensor  # [b, h2, w2, 3]
    confidence2: Tensor  # [b, h2, w2]


class PointmapNetwork(nn.Module, ABC):
    """Two batches of images in, a `Pair` out (DUSt3R, arXiv 2312.14132)."""

    @abstractmethod
    def forward(self, first: Tensor, second: Tensor) -> Pair:
        """Images [b, 3, h, w] and [b, 3, h2, w2] -> pointmaps in the first camera's frame."""
