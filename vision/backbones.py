"""The vision backbones that a configuration can name."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import nn

from ..core import backbone as core
from ..core.building import first_line, seeded, stumbles
from ..core.errors import AdaptError
from ..core.images.dinov2 import dinov2_small
from ..core.images.preprocessing import Preprocessing
from .tiny_vit import tiny_vit


@dataclass(frozen=True, kw_only=True)
class Backbone(core.Backbone):
    """A timm model without a head: images [n, c, h, w] -> features [n, d].

    >>> Backbone.from_json(TinyViT().to_json())
    TinyViT()
    """

    def preprocessing(self, model: nn.Module) -> Preprocessing:
        """What timm says that the built model wants its images to be."""
        return Preprocessing.of(model)


@dataclass(frozen=True, kw_only=True)
class TimmBackbone(Backbone):
    """Any timm model with `forward_features`: ViT, DeiT, DINOv2, Swin, ... by its timm name.

    `pretrained=False` draws random weights from `seed`, so that it, too, can be built again.
    `options` go to `timm.create_model` (depth, patch_size, ...).

    Raises `AdaptError` for an unknown name (with the nearest ones), an option that the model does
    not take, and weights that do not exist or cannot be fetched: random ones never stand in.

    >>> import torch
    >>> vit = TimmBackbone(
    ...     name="vit_tiny_patch16_224", pretrained=False, img_size=32, options={"depth": 1}
    ... ).build()
    >>> vit(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 192])
    """

    name: str
    pretrained: bool = True
    img_size: int | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        if not timm.is_model(self.name):
            near = difflib.get_close_matches(self.name.split(".")[0], timm.list_models(), n=3)
            raise AdaptError(
                f"timm has no model {self.name!r}"
                + (f"; nearest: {', '.join(near)}" if near else "; timm.list_models() names all")
            )
        options = dict(self.options)
        if self.img_size is not None:
            options["img_size"] = self.img_size
        with seeded(self.seed), _quiet_hub():
            return self._create(options)

    def preprocessing(self, model: nn.Module) -> Preprocessing:
        return Preprocessing.of(model, self.img_size, self.options.get("in_chans", 3))

    def _create(self, options: dict[str, Any]) -> nn.Module:
        try:
            return timm.create_model(
                self.name, pretrained=self.pretrained, num_classes=0, **options
            )
        except OSError as error:  # the hub's errors, no network and a full disk are all OSErrors
            raise AdaptError(
                f"the weights of {self.name!r} could not be fetched: {first_line(error)} Without"
                " a network, use OfflineDINOv2 or TinyViT"
            ) from error
        except stumbles() as error:  # options of a wrong type or size, or none of the model's
            what = f"{self.name!r} with {options}"
            raise AdaptError(f"timm cannot make {what}: {first_line(error)}") from error


@dataclass(frozen=True, kw_only=True)
class OfflineDINOv2(Backbone):
    """The DINOv2 ViT-S/14 that a package index brings; `img_size` is a multiple of 14."""

    img_size: int = 98

    def build(self) -> nn.Module:
        return dinov2_small(self.img_size)


@dataclass(frozen=True, kw_only=True)
class TinyViT(Backbone):
    """The tiny ViT whose weights lie in this repository: 24 x 24 pixels, width 96."""

    def build(self) -> nn.Module:
        return tiny_vit(pretrained=True)


def feature_width(model: nn.Module) -> int:
    """d of the features [n, d] that a timm model without a head returns."""
    width = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
    if not isinstance(width, int):
        raise AdaptError(f"{type(model).__name__} does not say how wide its features are")
    return width


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without a network, the hub's client logs a dozen retries; the error that follows says it."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
