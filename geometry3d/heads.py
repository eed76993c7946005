"""What turns tokens into four numbers for each pixel: a point and its confidence, still raw.

The parts have the names of DUSt3R's published files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

HeadKind = Literal["dpt", "linear"]
PATCH = 16
OUTPUTS = 4  # x, y, z, confidence
LAYER_WIDTHS, FEATURES, LAST = (96, 192, 384, 768), 256, 128  # the published DPT's


class LinearHead(nn.Module):
    """One linear layer on the decoder's last tokens, its numbers spread over the token's pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, OUTPUTS * PATCH**2)

    def forward(self, layers: Sequence[Tensor], rows: int, columns: int) -> Tensor:
        """Tokens of all layers [b, rows * columns, d] -> [b, 4, 16 rows, 16 columns]."""
        raw = self.proj(layers[-1]).mT.unflatten(-1, (rows, columns))
        return F.pixel_shuffle(raw, PATCH)


class DPTHead(nn.Module):
    """Four layers of tokens, brought to four sizes and fused from coarse to fine.

    Dense prediction transformer (arXiv 2103.13413) on the encoder's last layer and on three of the
    decoder's: after a half, three quarters and all of its blocks.
    """

    def __init__(
        self,
        encoder_width: int,
        width: int,
        depth: int,
        layer_widths: Sequence[int] = LAYER_WIDTHS,
        features: int = FEATURES,
    ) -> None:
        super().__init__()
        self.hooks = (0, depth // 2, depth * 3 // 4, depth)
        widths = (encoder_width, width, width, width)
        self.dpt = _DPT(widths, layer_widths, features)

    def forward(self, layers: Sequence[Tensor], rows: int, columns: int) -> Tensor:
        """Tokens of all layers [b, rows * columns, d] -> [b, 4, 16 rows, 16 columns]."""
        chosen = [layers[hook].mT.unflatten(-1, (rows, columns)) for hook in self.hooks]
        raw: Tensor = self.dpt(chosen)
        return raw


class _DPT(nn.Module):
    def __init__(self, widths: Sequence[int], layers: Sequence[int], features: int) -> None:
        super().__init__()
        a, b, _, d = layers
        sizes: list[list[nn.Module]] = [  # to 4, 2, 1 and 1/2 times the tokens' grid
            [nn.ConvTranspose2d(a, a, 4, stride=4)],
            [nn.ConvTranspose2d(b, b, 2, stride=2)],
            [],
            [nn.Conv2d(d, d, 3, stride=2, padding=1)],
        ]
        self.act_postprocess = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, layer, 1), *size)
            for width, layer, size in zip(widths, layers, sizes, strict=True)
        )
        self.scratch = _Fusion(layers, features)
        self.head = nn.Sequential(
            nn.Conv2d(features, features // 2, 3, padding=1),
            _Twice(),
            nn.Conv2d(features // 2, features // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(features // 2, OUTPUTS, 1),
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        sized = [post(m) for post, m in zip(self.act_postprocess, maps, strict=True)]
        raw: Tensor = self.head(self.scratch(sized))
        return raw


class _Fusion(nn.Module):
    def __init__(self, layers: Sequence[int], features: int) -> None:
        super().__init__()
        for number, layer in enumerate(layers, 1):
            conv = nn.Conv2d(layer, features, 3, padding=1, bias=False)
            self.add_module(f"layer{number}_rn", conv)
            self.add_module(f"refinenet{number}", _Refine(features))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """From the coarsest to the finest; a coarse map of odd size is cut to the next one's."""
        path: Tensor | None = None
        for number in range(len(maps), 0, -1):
            layer = self.get_submodule(f"layer{number}_rn")(maps[number - 1])
            if path is not None:
                path = path[..., : layer.shape[-2], : layer.shape[-1]]
            path = self.get_submodule(f"refinenet{number}")(layer, path)
        assert path is not None, "there are four maps"
        return path


class _Refine(nn.Module):
    """What comes from the coarser map plus the refined layer, refined, at twice the size."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.resConfUnit1 = _Unit(features)  # the coarsest map has it and does not use it
        self.resConfUnit2 = _Unit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, layer: Tensor, path: Tensor | None) -> Tensor:
        joint = layer if path is None else path + self.resConfUnit1(layer)
        refined: Tensor = self.out_conv(_doubled(self.resConfUnit2(joint)))
        return refined


class _Unit(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        seen: Tensor = image + self.conv2(F.relu(self.conv1(F.relu(image))))
        return seen


class _Twice(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return _doubled(image)


def _doubled(image: Tensor) -> Tensor:
    return F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=True)


def points_of(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Raw numbers [b, 4, h, w] -> points [b, h, w, 3] and confidence [b, h, w].

    v = the first three: X = v / |v| (exp|v| - 1), so that the distance |X| is exp|v| - 1.
    C = 1 + exp(c), above 1 (DUSt3R, arXiv 2312.14132: the file's words are depth_mode exp and
    conf_mode exp from 1).

    >>> import torch
    >>> raw = torch.tensor([0.0, 0.0, 3.0, 0.0]).log1p().reshape(1, 4, 1, 1)
    >>> points, confidence = points_of(raw)
    >>> points.flatten().round(decimals=4).tolist(), confidence.item()
    ([0.0, 0.0, 3.0], 2.0)
    """
    v = raw[:, :3].movedim(1, -1)
    length = v.norm(dim=-1, keepdim=True)
    return v / length.clamp_min(1e-8) * length.expm1(), 1 + raw[:, 3].exp()
