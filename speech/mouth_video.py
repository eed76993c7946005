"""Generated mouths: where no licensed video can be had, something that moves with the voice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .mouth_crops import CROP, RATE

_SAMPLES = 16_000 // RATE  # of one picture
_SHARP = 2.0  # pixels over which the lips' edge fades


def mouth_video(clip: Tensor, generator: Generator, size: int = CROP) -> Tensor:
    """Samples [n] at 16 kHz -> uint8 [n // 640, size, size]: a dark ellipse opens in a grey face.

    Its height follows the envelope: the square root of the power within each picture's 40 ms,
    relative to the clip's largest. Place, width, brightness and pixel noise are the generator's,
    and every clip's own. It shows how loud the voice is and when, nothing of what it says: less
    than real lips do, and cleaner.

    >>> mouth_video(torch.zeros(16_000), Generator().manual_seed(0)).shape
    torch.Size([25, 88, 88])
    """
    opening = envelope(clip)
    y0, x0, wide, skin, dark = torch.rand(5, generator=generator).tolist()
    centre = size * (0.45 + 0.1 * y0), size * (0.45 + 0.1 * x0)
    half_width = size * (0.25 + 0.1 * wide)
    half_height = size * (0.02 + 0.28 * opening).view(-1, 1, 1)
    grid = torch.arange(size, dtype=torch.float32)
    y, x = (grid - centre[0]).view(-1, 1), (grid - centre[1]).view(1, -1)
    radius = ((y / half_height) ** 2 + (x / half_width) ** 2).sqrt()
    inside = torch.sigmoid((1 - radius) * half_height / _SHARP)
    face, mouth = 0.5 + 0.2 * skin, 0.05 + 0.2 * dark
    grey = face + (mouth - face) * inside
    noise = 0.03 * torch.randn(grey.shape, generator=generator)
    pictures: Tensor = ((grey + noise).clamp(0, 1) * 255).round().to(torch.uint8)
    return pictures


def envelope(clip: Tensor) -> Tensor:
    """Samples [n] -> [n // 640], the root mean square of each picture's time, largest 1.

    >>> envelope(torch.cat([torch.zeros(640), torch.ones(640), torch.ones(640) / 2]))
    tensor([0.0000, 1.0000, 0.5000])
    """
    frames = clip.numel() // _SAMPLES
    power = F.avg_pool1d(clip.float().square().view(1, 1, -1), _SAMPLES).view(-1)[:frames]
    loud = power.sqrt()
    return loud / loud.max().clamp(min=1e-9)
