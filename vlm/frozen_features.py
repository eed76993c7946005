"""Features of a frozen image-text model on a few-shot data set, computed once for all baselines."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..core.images.data import ImageData, Images
from .backbones import Backbone
from .data_words import require_test
from .model import ImageText
from .predict import device
from .text_features import class_features

Shots = Callable[[int, int], ImageData]
"""(shots, seed) -> the data; the test part is the same for all."""


class FrozenFeatures:
    """Normalised features on the CPU: of the test part, of K shots by seed, of the class prompts.

    Nothing is computed before it is asked for.
    """

    def __init__(self, backbone: Backbone, data: Shots, template: str, batch: int = 64) -> None:
        self.backbone = backbone
        self.data = data
        self.template = template
        self.batch = batch

    @cached_property
    def pair(self) -> ImageText:
        """The model, where the commands compute."""
        return self.backbone.image_text(self.backbone.build().eval().to(device()))

    def classes_of(self, data: ImageData) -> Tensor:
        """[c, d]."""
        return class_features(self.pair, data.classes, [self.template]).float().cpu()

    def shots(self, shots: int, seed: int) -> ImageData:
        """The data module, read and told what the model wants to see."""
        data = self.data(shots, seed)
        data.preprocessing = self.pair.preprocessing
        data.prepare_data()
        data.setup()
        return data

    def train(self, data: ImageData, views: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the shots: as evaluation sees them [n, d], varied as in training [v, n, d], labels.

        A view is a pure function of (seed, epoch, image): view v is that of epoch v of training.
        """
        varied = data.images("train")
        plain = Images(varied.source, varied.indices, varied.wants)
        seen = [self._features(varied, epoch)[0] for epoch in range(views)]
        features, labels = self._features(plain)
        return features, torch.stack(seen) if seen else features[None], labels

    def test(self, data: ImageData) -> tuple[Tensor, Tensor]:
        """Features [m, d] and labels [m] of the test part."""
        require_test(data)
        return self._test(data)

    def _test(self, data: ImageData) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "_kept"):
            self._kept = self._features(data.images("test"))
        return self._kept

    @torch.no_grad()
    def _features(self, images: Images, epoch: int = 0) -> tuple[Tensor, Tensor]:
        keys = [(epoch, position) for position in range(len(images))]
        loader = DataLoader(images, self.batch, sampler=keys)
        found, labels = [], []
        for pixels, label in loader:
            found.append(self.pair.image_features(pixels.to(self.pair.device)).float().cpu())
            labels.append(label)
        return torch.cat(found), torch.cat(labels)
