"""The tiny vision transformer of this repository: timm's own class with a small convolution stem.

Its weights (1.6 MB) lie next to this file, so that a first adapter can be trained without a
download. `pretrain_tiny.py` made them and makes them again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..core.errors import AdaptError

WEIGHTS = Path(__file__).parent / "weights" / "tiny_vit.safetensors"
PRETRAINING_HEAD = "pretraining_head."  # the file's letter classifier, which nothing else needs
IMAGE_SIZE = 24
PATCH_SIZE = 6
DATA_CONFIG: dict[str, Any] = {
    "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


class ConvStem(nn.Module):
    """Three 3x3 convolutions of strides 2, 1, 3: [batch, 3, 24, 24] -> [batch, 16, width].

    It takes the place of timm's `PatchEmbed` (one 6x6 convolution), which learns edges far more
    slowly from small images: "Early Convolutions Help Transformers See Better", arXiv 2106.14881.
    GroupNorm and not BatchNorm: a frozen backbone must not change when it runs in train mode.

    Raises:
        AdaptError: for an image of another size.

    >>> ConvStem(embed_dim=96)(torch.zeros(2, 3, 24, 24)).shape
    torch.Size([2, 16, 96])
    """

    def __init__(
        self,
        img_size: int = IMAGE_SIZE,
        patch_size: int = PATCH_SIZE,
        in_chans: int = 3,
        embed_dim: int = 96,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if patch_size != PATCH_SIZE or img_size % PATCH_SIZE or dynamic_img_pad:
            raise AdaptError(
                f"the stem was asked for {img_size} px in patches of {patch_size} px "
                f"(padding {dynamic_img_pad}): it divides by {PATCH_SIZE} only, without padding"
            )
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        narrow, wide = embed_dim // 4, embed_dim // 2
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, narrow, 3, stride=2, padding=1, **where),
            nn.GroupNorm(1, narrow, **where),
            nn.GELU(),
            nn.Conv2d(narrow, wide, 3, padding=1, **where),
            nn.GroupNorm(1, wide, **where),
            nn.GELU(),
            nn.Conv2d(wide, embed_dim, 3, stride=3, bias=bias, **where),
        )

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) != self.img_size:
            raise AdaptError(
                f"images are {tuple(images.shape[-2:])}: the tiny ViT takes {self.img_size}"
            )
        tokens: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return tokens


def tiny_vit(pretrained: bool = True) -> VisionTransformer:
    """Build the tiny ViT: [batch, 3, 24, 24] -> class-token feature [batch, 96].

    Width 96, depth 3, 3 heads, 4x4 tokens, 390,240 parameters; `timm.data.
    resolve_model_data_config` finds its preprocessing. With `pretrained=False` the weights are
    random and the packaged file isn't read.

    Raises:
        AdaptError: when the packaged weight file is missing.

    >>> tiny_vit(pretrained=False)(torch.zeros(2, 3, 24, 24)).shape
    torch.Size([2, 96])
    """
    model = VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        num_classes=0,
        embed_dim=96,
        depth=3,
        num_heads=3,
        embed_layer=ConvStem,
    )
    config = {"architecture": "tiny_vit", "num_classes": 0} | DATA_CONFIG
    model.__dict__["pretrained_cfg"] = config  # a plain attribute, as timm sets it
    if pretrained:
        if not WEIGHTS.is_file():
            raise AdaptError(
                f"the tiny ViT has no weight file {WEIGHTS.name}: reinstall the package, or make "
                "it with `polyadapt vision pretrain-tiny`"
            )
        weights = load_file(WEIGHTS)
        own = {n: t for n, t in weights.items() if not n.startswith(PRETRAINING_HEAD)}
        model.load_state_dict(own)
    return model
