"""What the adapter file of a scene says besides its adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import AdaptError, StoreError
from ..core.sets import AdapterSet
from ..core.store import read_file
from .backbones import Backbone
from .weights import Calibrated

TASK = "scene calibration"
_NUMBERS = ("mu", "gate", "cut", "before", "after")
FEATURES = "features"  # of the views, among the tensors of the file


@dataclass(frozen=True, kw_only=True)
class Scene:
    """How a scene was calibrated, and how to see it again.

    size:   (height, width) of its views
    focal:  in pixels of the original images, where it was known
    space, mu, gate, cut: of the calibrated weights; mu is the one that was used
    before, after: the error on held-out pairs, see `calibrate`
    """

    name: str
    backbone: Backbone
    size: tuple[int, int]
    focal: float | None
    space: str
    mu: float
    gate: float
    cut: float
    before: float
    after: float

    def __post_init__(self) -> None:
        said = vars(self)
        wrong = [name for name in _NUMBERS if not isinstance(said[name], (int, float))]
        if not isinstance(said["name"], str):
            wrong.append("name")
        if self.space not in ("log", "raw"):
            wrong.append("space")
        if min(self.size) < 1:
            wrong.append("size")
        known = said["focal"]
        if known is not None and not (isinstance(known, (int, float)) and 0 < known < math.inf):
            wrong.append("focal")
        if wrong:
            raise AdaptError(f"a scene's {wrong[0]} is {said[wrong[0]]!r}, which cannot be")

    def to_json(self) -> dict[str, Any]:
        """JSON values for the file."""
        plain = {name: value for name, value in vars(self).items() if name != "backbone"}
        return {"task": TASK, **plain, "size": [*self.size], "backbone": self.backbone.to_json()}

    def rule(self) -> Calibrated:
        """Weights in the space that the scene was calibrated in; mu is found anew."""
        return Calibrated(space="raw" if self.space == "raw" else "log", gate=self.gate)


def save_scene(adapters: AdapterSet, path: Path, scene: Scene, features: Tensor) -> None:
    """Write a scene's file: the set, how it was made, and its views' features [n, d]."""
    adapters.extra = scene.to_json()
    adapters.head = {FEATURES: features.detach().float().cpu()}
    adapters.save(path)


def read_scene(path: Path) -> tuple[Scene, Tensor]:
    """(what a scene's file says, its views' features [n, d]); StoreError where it is none."""
    file = read_file(path)
    if file.extra.get("task") != TASK:
        raise StoreError(f"{path} holds no calibrated scene: task {file.extra.get('task')!r}")
    try:
        said = dict(file.extra)
        del said["task"]
        height, width = map(int, said.pop("size"))
        backbone = Backbone.from_json(said.pop("backbone"))
        scene = Scene(backbone=backbone, size=(height, width), **said)
        features = file.head[FEATURES]
    except AdaptError as error:  # before ValueError, which it is
        raise StoreError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} lacks or misstates {error} of a calibrated scene") from error
    if features.ndim != 2 or not len(features):
        raise StoreError(f"{path}: features {list(features.shape)} of views are not [n, d]")
    return scene, features
