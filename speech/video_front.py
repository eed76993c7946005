"""The video fronts of the fusion module: a CNN on mouth crops, or precomputed features.

Both map 25 Hz to the mel's 100 Hz by two transposed convolutions of stride 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch.nn.functional as F
from torch import Tensor, nn

MELS_PER_FRAME: Final = 4  # 100 Hz mel frames to one video frame at 25 Hz

_SPACE: Final = (0, 1, 1)  # padding of a 3x3 kernel that leaves time alone


class VideoFront(nn.Module):
    """Grey mouth crops [b, 1, f, h, w] at 25 Hz -> v [b, 4 f, mels].

    Conv3d 1 -> c0, kernel (1, 7, 7), stride (1, 2, 2), norm, ReLU, max-pool; four stages of
    residual blocks, each followed by one bottleneck block that looks 5 frames far; time is doubled
    after stages 2 and 3; a 1x1 convolution to `mels` and the mean over what is left of the image
    (3 x 3 for crops of 88 x 88). At the published size 7,732,112 parameters (arXiv 2312.13873): the
    count fixes the kernels (5, 3, 3) of the bottlenecks, the biases, and a norm on the skips.

    >>> front = VideoFront(80, (64, 128, 256, 256), (2, 2, 2, 3), 64)
    >>> sum(p.numel() for p in front.parameters())
    7732112
    """

    def __init__(
        self, mels: int, channels: Sequence[int], blocks: Sequence[int], inner: int
    ) -> None:
        super().__init__()
        self.start = nn.Sequential(
            nn.Conv3d(1, channels[0], (1, 7, 7), (1, 2, 2), (0, 3, 3)),
            nn.BatchNorm3d(channels[0]),
            nn.ReLU(),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), _SPACE),
        )
        parts: list[nn.Module] = []
        width = channels[0]
        for stage, (out, depth) in enumerate(zip(channels, blocks, strict=True)):
            strides = [1 if stage == 0 else 2, *[1] * (depth - 1)]
            for stride in strides:
                parts.append(ResidualFrames(width, out, stride))
                width = out
            parts.append(Bottleneck(out, inner))
            if stage in (1, 2):
                parts.append(nn.ConvTranspose3d(out, out, (6, 1, 1), (2, 1, 1), (2, 0, 0)))
        self.stages = nn.Sequential(*parts)
        self.out = nn.Conv3d(width, mels, 1)

    def forward(self, video: Tensor) -> Tensor:
        image: Tensor = self.out(self.stages(self.start(video)))  # [b, mels, 4 f, h', w']
        return image.mean((-2, -1)).transpose(1, 2)


class FeatureFront(nn.Module):
    """Precomputed features [b, f, d] at 25 Hz (AV-HuBERT: d = 1024) -> v [b, 4 f, mels].

    Our choice: a linear map, then the CNN's two doublings in time with a ReLU between them.
    """

    def __init__(self, features: int, mels: int) -> None:
        super().__init__()
        self.start = nn.Linear(features, mels)
        self.faster = nn.Sequential(_doubled(mels), nn.ReLU(), _doubled(mels))

    def forward(self, features: Tensor) -> Tensor:
        v: Tensor = self.faster(self.start(features).transpose(1, 2))
        return v.transpose(1, 2)


def _doubled(width: int) -> nn.Module:
    return nn.ConvTranspose1d(width, width, 6, 2, 2)


class ResidualFrames(nn.Module):
    """A residual block on each frame: 3x3, norm, ReLU, 3x3, norm, + skip, ReLU."""

    def __init__(self, d_in: int, d_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(d_in, d_out, (1, 3, 3), (1, stride, stride), _SPACE),
            nn.BatchNorm3d(d_out),
            nn.ReLU(),
            nn.Conv3d(d_out, d_out, (1, 3, 3), padding=_SPACE),
            nn.BatchNorm3d(d_out),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or d_in != d_out:
            narrow = nn.Conv3d(d_in, d_out, 1, (1, stride, stride))
            self.skip = nn.Sequential(narrow, nn.BatchNorm3d(d_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class Bottleneck(nn.Module):
    """1x1 to `inner`, (5, 3, 3), 1x1 back, + x: the only place where frames meet."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(width, inner, 1),
            nn.BatchNorm3d(inner),
            nn.ReLU(),
            nn.Conv3d(inner, inner, (5, 3, 3), padding=(2, 1, 1)),
            nn.BatchNorm3d(inner),
            nn.ReLU(),
            nn.Conv3d(inner, width, 1),
            nn.BatchNorm3d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x)
