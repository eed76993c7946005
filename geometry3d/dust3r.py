"""A two-view transformer of DUSt3R's kind, written from its paper and the shapes of its files.

"DUSt3R: Geometric 3D Vision Made Easy", arXiv 2312.14132, on CroCo v2, arXiv 2211.10408. No code
of either is in here. The parts have the names of the published files, which therefore load.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.errors import AdaptError
from .blocks import EPSILON, Block, DecoderBlock
from .heads import FEATURES, LAYER_WIDTHS, PATCH, DPTHead, HeadKind, LinearHead, points_of
from .pointmaps import Pair, PointmapNetwork
from .rope import Rotary, grid_positions, rotary

SITES = ("**.attn.qkv", "**.cross_attn.{projq,projk,projv}")  # 18.1 MB at rank 16, as published
ALL_ATTENTION = ("**.attn.{qkv,proj}", "**.cross_attn.{projq,projk,projv,proj}")


@dataclass(frozen=True, kw_only=True)
class Dust3rSize:
    """Widths, depths and heads; the defaults are the published ViT-L's.

    Raises `AdaptError` for a width that its heads do not divide into rotary planes, and a DPT head
    on fewer than 4 decoder blocks.
    """

    encoder_width: int = 1024
    encoder_depth: int = 24
    encoder_heads: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    head: HeadKind = "dpt"
    layer_widths: tuple[int, ...] = LAYER_WIDTHS
    features: int = FEATURES

    def __post_init__(self) -> None:
        for width, heads in ((self.encoder_width, self.encoder_heads), (self.width, self.heads)):
            if heads < 1 or width % (4 * heads):
                raise AdaptError(f"{heads} heads of {width} numbers: each needs a multiple of 4")
        if self.head == "dpt" and self.depth < 4:
            raise AdaptError(f"a DPT head on {self.depth} decoder blocks: it needs at least 4")


class Dust3r(PointmapNetwork):
    """Images whose sides divide by 16 -> pointmaps in the first camera's frame, and confidences.

    A ViT encodes each image; two decoders of the same shape, one for each image, attend to each
    other's tokens block by block; a head each. The heads run in fp32, also under autocast. A batch
    that holds every pair in both orders, neighbours (a, b), (b, a), is encoded once.

    Raises `AdaptError` for images whose sides do not divide by 16.

    >>> size = Dust3rSize(encoder_width=16, encoder_depth=1, encoder_heads=2, width=16, depth=1,
    ...                   heads=2, head="linear")
    >>> pair = Dust3r(size)(torch.rand(1, 3, 32, 48), torch.rand(1, 3, 16, 32))
    >>> pair.points1.shape, pair.points2.shape
    (torch.Size([1, 32, 48, 3]), torch.Size([1, 16, 32, 3]))
    """

    def __init__(self, size: Dust3rSize) -> None:
        super().__init__()
        self.size = size
        wide, width = size.encoder_width, size.width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))  # of CroCo's training; unused here
        self.patch_embed = _Patches(wide)
        self.enc_blocks = nn.ModuleList(
            Block(wide, size.encoder_heads) for _ in range(size.encoder_depth)
        )
        self.enc_norm = nn.LayerNorm(wide, eps=EPSILON)
        self.decoder_embed = nn.Linear(wide, width)
        self.dec_blocks = nn.ModuleList(DecoderBlock(width, size.heads) for _ in range(size.depth))
        self.dec_blocks2 = nn.ModuleList(DecoderBlock(width, size.heads) for _ in range(size.depth))
        self.dec_norm = nn.LayerNorm(width, eps=EPSILON)
        self.downstream_head1 = _head(size)
        self.downstream_head2 = _head(size)

    def forward(self, first: Tensor, second: Tensor) -> Pair:
        for images in (first, second):
            if images.shape[-2] % PATCH or images.shape[-1] % PATCH:
                raise AdaptError(
                    f"images of {images.shape[-2]} x {images.shape[-1]} pixels: both sides must"
                    f" divide by {PATCH}"
                )
        one, two = self._encoded(first, second)
        layers1, layers2 = self._decoded(one, two, _grid(first), _grid(second))
        points1, confidence1 = _pixels(self.downstream_head1, layers1, _grid(first))
        points2, confidence2 = _pixels(self.downstream_head2, layers2, _grid(second))
        return Pair(points1, confidence1, points2, confidence2)

    def encode(self, images: Tensor) -> Tensor:
        """Images [b, 3, h, w] in 0..1 -> normed tokens [b, h/16 * w/16, d]."""
        tokens = self.patch_embed(2 * images - 1)
        places = _places(_grid(images), self.size.encoder_width // self.size.encoder_heads, images)
        for block in self.enc_blocks:
            tokens = block(tokens, places)
        normed: Tensor = self.enc_norm(tokens)
        return normed

    def _encoded(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        if first.shape != second.shape:
            return self.encode(first), self.encode(second)
        if not _both_orders(first, second):
            one, two = self.encode(torch.cat([first, second])).chunk(2)
            return one, two
        one, two = self.encode(torch.cat([first[::2], second[::2]])).chunk(2)
        return torch.stack([one, two], 1).flatten(0, 1), torch.stack([two, one], 1).flatten(0, 1)

    def _decoded(
        self, one: Tensor, two: Tensor, grid1: tuple[int, int], grid2: tuple[int, int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The encoder's tokens, then those after every block; the last ones normed."""
        head_width = self.size.width // self.size.heads
        places, their = (_places(grid, head_width, one) for grid in (grid1, grid2))
        layers = [(one, two)]
        one, two = self.decoder_embed(one), self.decoder_embed(two)
        for block, block2 in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            one, two = block(one, two, places, their), block2(two, one, their, places)
            layers.append((one, two))
        layers[-1] = self.dec_norm(one), self.dec_norm(two)
        return [a for a, _ in layers], [b for _, b in layers]


class _Patches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, stride=PATCH)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.proj(images).flatten(2).mT
        return tokens


def _head(size: Dust3rSize) -> nn.Module:
    if size.head == "linear":
        return LinearHead(size.width)
    return DPTHead(size.encoder_width, size.width, size.depth, size.layer_widths, size.features)


def _grid(images: Tensor) -> tuple[int, int]:
    return images.shape[-2] // PATCH, images.shape[-1] // PATCH


def _places(grid: tuple[int, int], head_width: int, like: Tensor) -> Rotary:
    return rotary(grid_positions(*grid, like.device), head_width)


def _pixels(head: nn.Module, layers: list[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The exponentials need fp32 and its range, whatever the blocks ran in."""
    with torch.autocast(layers[-1].device.type, enabled=False):
        return points_of(head([layer.float() for layer in layers], *grid))


def _both_orders(first: Tensor, second: Tensor) -> bool:
    """Whether each pair is followed by the same two images the other way round."""
    if len(first) % 2:
        return False
    return torch.equal(first[::2], second[1::2]) and torch.equal(first[1::2], second[::2])
