"""A SAM for smaller images: its tables of positions are resampled, its windows stay."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import AdaptError
from .sam import SegmentAnything


def resize(sam: SegmentAnything, img_size: int) -> SegmentAnything:
    """The same SAM with a ViT as its encoder, in place, for images [b, 3, img_size, img_size].

    The images are taken to show the whole scene in fewer pixels, not a part of it. So absolute
    positions [1, g, g, c] are resampled bicubically to the new grid g' = img_size / patch,
    the relative ones of the blocks that attend globally, [2 g - 1, c], linearly to 2 g' - 1, as
    SAM's attention would do at every call (arXiv 2304.02643 pads and crops nothing there). Windows
    keep their size and tables, so small grids are padded to whole windows, as SAM pads 64 to 70. At
    its own size nothing is touched: the frozen function is the same bit for bit.

    Raises `AdaptError` for a size that is no positive multiple of the patch.
    """
    encoder: Any = sam.vision_encoder
    patch = encoder.patch_embed.patch_size[0]
    require_multiple(img_size, patch)
    if img_size == sam.img_size:
        return sam
    grid = img_size // patch
    encoder.patch_embed.image_size = (img_size, img_size)
    encoder.image_size = img_size
    if encoder.pos_embed is not None:
        encoder.pos_embed = _frozen_like(encoder.pos_embed, absolute(encoder.pos_embed, grid))
    for layer in encoder.layers:
        if layer.window_size == 0 and layer.attn.use_rel_pos:
            for name in ("rel_pos_h", "rel_pos_w"):
                table = getattr(layer.attn, name)
                setattr(layer.attn, name, _frozen_like(table, relative(table, grid)))
    set_prompt_size(sam, img_size, grid)
    return sam


def require_multiple(img_size: int, step: int) -> None:
    """Refuse a size of which no whole grid can be cut."""
    if img_size < step or img_size % step:
        raise AdaptError(f"img_size {img_size} is not allowed: a positive multiple of {step}")


def set_prompt_size(sam: SegmentAnything, img_size: int, grid: int) -> None:
    """Tell the prompt encoder what a pixel is: it has no table that depends on the size."""
    sam.prompt_encoder.input_image_size = img_size
    sam.prompt_encoder.image_embedding_size = (grid, grid)


# In fp64, then rounded: another machine all but surely resamples to the same bits, so that a
# file which names the frozen weights by their bits fits there, too.


def absolute(table: Tensor, grid: int) -> Tensor:
    """Positions [1, g, g, c] -> [1, grid, grid, c]."""
    planes = table.detach().double().permute(0, 3, 1, 2)
    resampled = F.interpolate(planes, (grid, grid), mode="bicubic", antialias=True)
    return resampled.permute(0, 2, 3, 1).to(table.dtype)


def relative(table: Tensor, grid: int) -> Tensor:
    """Relative positions [2 g - 1, c] -> [2 grid - 1, c]; the middle, no distance, stays."""
    lines = table.detach().double().T[None]
    return F.interpolate(lines, 2 * grid - 1, mode="linear")[0].T.to(table.dtype)


def _frozen_like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)
