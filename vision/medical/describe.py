"""What a segmentation's adapter file says, and the file in use: a picture -> logits at its size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...core.errors import AdaptError, StoreError
from ...core.store import check_fit, load, read_file
from .backbones import Backbone
from .losses import Loss
from .mask_head import ClassToken, MaskHead, TextToken
from .sam import Prompt, SegmentAnything
from .view import Pixels, View

TASK = "segmentation"
HEAD = "head."  # how the task calls its head
Token = Literal["class", "text", "none"]


@dataclass(frozen=True)
class Description:
    """What a segmentation's adapter file says besides its adapters.

    `parts` are the parts of the SAM that the head holds (`mask_head.PARTS`), `token` the prompt
    that it learned, `structure` what it marks, `fractions` whether its masks were shares of pixels,
    `head` its tensors by their names in `MaskHead`; `crop` the side of the squares, in native
    pixels, that it was trained on, None for whole pictures, and `levels` what was black and white
    in them, None for their own darkest and brightest value.
    """

    backbone: Backbone
    view: View
    parts: tuple[str, ...]
    token: Token
    whole_box: bool
    structure: str
    loss: Loss
    fractions: bool
    head: dict[str, Tensor]
    crop: int | None = None
    levels: tuple[float, float] | None = None

    def extra(self) -> dict[str, Any]:
        """All but the tensors as JSON values, as they stand in the file."""
        return {
            "task": TASK,
            "backbone": self.backbone.to_json(),
            "view": self.view.to_json(),
            "parts": list(self.parts),
            "prompt": {"token": self.token, "whole_box": self.whole_box},
            "classes": [self.structure],
            "loss": self.loss.to_json(),
            "fractions": self.fractions,
            **trained_on(self.crop, self.levels),
        }

    def made_head(self, sam: SegmentAnything) -> MaskHead:
        """The head with its numbers, on the CPU; a text prompt needs no text tower here."""
        head = MaskHead(sam, parts=self.parts, prompt=self._prompt(sam), whole_box=self.whole_box)
        check_fit(self.head, head.state_dict())
        head.load_state_dict(self.head)
        return head.eval()

    def _prompt(self, sam: SegmentAnything) -> ClassToken | TextToken | None:
        if self.token == "text":
            return TextToken(sam, self.head["prompt.features"])
        return ClassToken(sam) if self.token == "class" else None


def trained_on(crop: int | None, levels: tuple[float, float] | None) -> dict[str, Any]:
    """How the data showed pictures, as JSON values of the file."""
    return {"crop": crop, "levels": None if levels is None else list(levels)}


def describe(path: str | Path) -> Description:
    """Read what a segmentation's adapter file says besides its adapters.

    Raises `StoreError` for a file that is missing, damaged or of another task.
    """
    file = read_file(path)
    if file.extra.get("task") != TASK:
        raise StoreError(f"{path} holds no segmentation: task {file.extra.get('task')!r}")
    try:
        said = file.extra
        (structure,) = said["classes"]
        found = Description(
            backbone=Backbone.from_json(said["backbone"]),
            view=View.from_json(said["view"]),
            parts=tuple(map(str, said["parts"])),
            token=said["prompt"]["token"],
            whole_box=bool(said["prompt"]["whole_box"]),
            structure=str(structure),
            loss=Loss.from_json(said["loss"]),
            fractions=bool(said["fractions"]),
            head={name.removeprefix(HEAD): tensor for name, tensor in file.head.items()},
            crop=_crop(said.get("crop")),
            levels=_levels(said.get("levels")),
        )
    except AdaptError as error:
        raise StoreError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} lacks or misstates {error} of a segmentation") from error
    features = found.head.get("prompt.features", torch.zeros(()))
    if found.token not in get_args(Token) or (found.token == "text" and features.ndim != 2):
        raise StoreError(f"{path}: its prompt {found.token!r} is unknown, or not in the head")
    return found


def _crop(said: Any) -> int | None:
    if said is not None and (type(said) is not int or said < 1):
        raise ValueError(f"crop={said!r}")
    return said


def _levels(said: Any) -> tuple[float, float] | None:
    if said is None:
        return None
    low, high = map(float, said)
    if not low < high:
        raise ValueError(f"levels={said}")
    return low, high


class Segmenter:
    """An adapter file in use: its backbone, its set and its head in eval mode.

    Raises `StoreError` as `describe` does, and for a file whose tensors do not fit.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        self.about = describe(path)
        self.sam = self.about.backbone.build().eval()
        load(self.sam, path)
        self.head = self.about.made_head(self.sam)
        self.device = torch.device(device)
        self.sam.to(self.device)
        self.head.to(self.device)

    @torch.inference_mode()
    def logits(self, images: Tensor, prompt: Prompt | None = None) -> Tensor:
        """[b, 3, s, s], as the file's view makes them -> [b, 1, s, s]; marked where above 0."""
        logits: Tensor = self.head(self.sam, images.to(self.device), prompt)
        return logits

    def native(self, pixels: Pixels, prompt: Prompt | None = None) -> Tensor:
        """A picture uint8 [h, w, 3] -> logits [h, w] on the CPU.

        A prompt's places are pixels of the view's square.
        """
        logits = self.logits(self.about.view(pixels)[None], prompt)
        size = pixels.shape[0], pixels.shape[1]
        return self.about.view.native(logits, size)[0, 0].cpu()
