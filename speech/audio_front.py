"""The audio front of the fusion module: residual convolutions over the mel as an image."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class AudioFront(nn.Module):
    """Log-mel [b, mels, t] -> a [b, t, mels]: residual 3x3 blocks 1 -> c .. c -> 1, a linear map.

    At the published size (80 mels, c = 128, 7 blocks) 1,635,808 parameters (arXiv 2312.13873).
    Every convolution has a bias and the skip has no norm: that is what gives the published count.

    >>> sum(p.numel() for p in AudioFront(80, 128, 7).parameters())
    1635808
    """

    def __init__(self, mels: int, channels: int, blocks: int) -> None:
        super().__init__()
        widths = [1, *[channels] * (blocks - 1), 1]
        self.blocks = nn.Sequential(*(Residual2d(i, o) for i, o in pairwise(widths)))
        self.out = nn.Linear(mels, mels)

    def forward(self, mel: Tensor) -> Tensor:
        image = self.blocks(mel.transpose(1, 2).unsqueeze(1))  # [b, 1, t, mels]
        a: Tensor = self.out(image.squeeze(1))
        return a


class Residual2d(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + skip(x)), skip a 1x1 convolution where widths differ."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(d_in, d_out, 3, padding=1),
            nn.BatchNorm2d(d_out),
            nn.ReLU(),
            nn.Conv2d(d_out, d_out, 3, padding=1),
            nn.BatchNorm2d(d_out),
        )
        self.skip = nn.Identity() if d_in == d_out else nn.Conv2d(d_in, d_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))
