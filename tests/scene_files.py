"""Generated scenes as files: images and depth maps of 8 and 16 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def save_image(image: Tensor, path: Path) -> None:
    """[3, h, w] in 0..1, to the nearest of 8 bits."""
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


def save_depth(depth: Tensor, path: Path, scale: float) -> None:
    """[h, w] as 16 bits of 1 / scale."""
    Image.fromarray((depth * scale).round().numpy().astype(np.uint16)).save(path)
