"""What the adapter file of an image-text classifier says besides its adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import AdaptError, StoreError
from ..core.images.preprocessing import Preprocessing
from ..core.store import read_file
from .backbones import Backbone
from .prompts import class_prompts

TASK = "image-text classification"


@dataclass(frozen=True)
class Description:
    """Everything but the adapters that the classifier is made of."""

    backbone: Backbone
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    template: str
    scale: float

    def to_json(self) -> dict[str, Any]:
        """What travels in the file."""
        return {
            "task": TASK,
            "backbone": self.backbone.to_json(),
            "preprocessing": self.preprocessing.to_json(),
            "classes": list(self.classes),
            "template": self.template,
            "scale": self.scale,
        }


def describe(path: str | Path) -> Description:
    """Read it; `StoreError` for a file that is missing, damaged or of another task."""
    said = read_file(path).extra
    if said.get("task") != TASK:
        raise StoreError(f"{path} holds no image-text classifier: task {said.get('task')!r}")
    try:
        found = Description(
            backbone=Backbone.from_json(said["backbone"]),
            preprocessing=Preprocessing.from_json(said["preprocessing"]),
            classes=tuple(map(str, said["classes"])),
            template=str(said["template"]),
            scale=float(said["scale"]),
        )
        class_prompts(found.classes, found.template)
    except AdaptError as error:
        raise StoreError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path} lacks or misstates {error} of an image-text classifier"
        ) from error
    if not 0 < found.scale < float("inf"):
        raise StoreError(f"{path}: scale={found.scale} is not allowed: above 0")
    return found
