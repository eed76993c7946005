"""What a network says of whole pictures: at once, where a person points, or window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .sam import Prompt
from .view import View

Pixels = NDArray[np.uint8]
OVERLAP = 0.25


class Network(Protocol):
    """Squares [b, 3, s, s] as the view makes them -> logits [b, m, s, s]."""

    def __call__(self, images: Tensor, prompt: Prompt | None = None) -> Tensor: ...


def whole(network: Network, view: View, pictures: Sequence[Pixels]) -> Iterator[Tensor]:
    """Logits float32 [h, w] of each picture, at its own size, of all pictures in one batch.

    They are enlarged one by one, when asked for: at most one is held at a picture's size.
    """
    squares = network(torch.stack([view(pixels) for pixels in pictures])).float().cpu()
    for square, pixels in zip(squares, pictures, strict=True):
        yield view.native(square[0], pixels.shape[:2])


def prompted(network: Network, view: View, pixels: Pixels, prompt: Prompt) -> Tensor:
    """The same of one picture and the m masks of its prompt, of which the largest logit counts."""
    squares = network(view(pixels)[None], prompt).float().cpu()
    return view.native(squares[0].amax(0), pixels.shape[:2])


@torch.inference_mode()  # MONAI works in place on what may come from it
def in_windows(
    network: Network,
    view: View,
    pixels: Pixels,
    side: int,
    batch: int = 4,
    done: Callable[[float], None] = lambda _: None,
) -> Tensor:
    """The same of one picture, seen through windows of side x side of its own pixels.

    Each window is a picture of its own to the network, as in training with `crop`. Neighbours
    overlap by a quarter; where they do, logits are averaged with weights that fall off from a
    window's middle as a Gaussian does (MONAI's sliding windows). A picture that is smaller than a
    window is one. Holds the picture and two maps of it, 11 bytes per pixel. `done` is told the
    share of the picture that is through.
    """
    from monai.inferers.utils import sliding_window_inference

    height, width = pixels.shape[:2]
    window = min(side, height), min(side, width)

    def answer(_: Tensor, places: Sequence[Sequence[slice]]) -> Tensor:
        crops = [np.ascontiguousarray(pixels[y, x]) for _, _, y, x in places]
        squares = network(torch.stack([view(crop) for crop in crops])).float().cpu()
        done(places[-1][2].stop / height)
        return view.native(squares, window)

    # MONAI cuts windows out of a tensor; this one takes no memory, and tells where to cut.
    shape = torch.zeros(()).expand(1, 1, height, width)
    found: Any = sliding_window_inference(
        shape, window, batch, answer, overlap=OVERLAP, mode="gaussian", with_coord=True
    )
    logits: Tensor = found[0, 0]
    return logits
