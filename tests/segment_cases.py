"""Networks whose answer is known, for the tests of `vision segment`."""

from __future__ import annotations

import torch
from torch import Tensor

from polyadapt.vision.medical.sam import Prompt
from polyadapt.vision.medical.view import View

SIDE = 32
BRIGHT = View(side=SIDE, mean=(127.5,) * 3, std=(127.5,) * 3)
"""Every colour from -1 to 1."""


def bright(images: Tensor, prompt: Prompt | None = None) -> Tensor:
    """Marks what is brighter than half, in the view `BRIGHT`."""
    return images.mean(1, keepdim=True)


def in_boxes(images: Tensor, prompt: Prompt | None = None) -> Tensor:
    """One mask for each box of the prompt: what lies in it."""
    assert prompt is not None
    assert prompt.boxes is not None
    y, x = (torch.arange(images.shape[-1]) + 0.5 for _ in range(2))
    left, top, right, bottom = prompt.boxes[0].unbind(-1)
    rows = (y > top[:, None]) & (y < bottom[:, None])
    columns = (x > left[:, None]) & (x < right[:, None])
    return (rows[:, :, None] & columns[:, None])[None].float() - 0.5
