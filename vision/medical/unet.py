"""A U-Net trained from nothing on patches at native resolution: what an adapted SAM must beat."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.optim import AdamW

from ...core.building import seeded
from ...core.errors import AdaptError
from ...core.training import warmup_cosine
from .data import Case
from .losses import Loss

Pixels = NDArray[np.uint8]
Pair = tuple[Tensor, Tensor]  # a prepared picture [3, h, w] and its mask [1, h, w]

_TICKS = 10_000  # of the schedule, when a run is limited by time


@dataclass(frozen=True, kw_only=True)
class PatchUNet:
    """MONAI's UNet on square patches of native pixels, with AdamW, warm-up and cosine.

    channels: per level, each of half the resolution of the one before (the first has half the
    picture's); side: of a patch, in pixels, a multiple of 2 ** len(channels); batch: patches per
    step; lr, weight_decay: of AdamW; window: the part of the shorter side over which a picture's
    light and contrast are evened out, see `prepared`; overlap: of the windows in `segment`.

    Raises `AdaptError` for a side that no whole grid covers.

    >>> settings = PatchUNet(channels=(4, 8), side=16)
    >>> settings.build(seed=0)(torch.zeros(1, 3, 16, 16)).shape
    torch.Size([1, 1, 16, 16])
    """

    channels: tuple[int, ...] = (16, 32, 64, 128, 256)
    side: int = 128
    batch: int = 8
    lr: float = 1e-2
    weight_decay: float = 1e-4
    window: float = 1 / 16
    overlap: float = 0.25

    def __post_init__(self) -> None:
        step = 2 ** len(self.channels)
        if self.side < step or self.side % step:
            raise AdaptError(f"side={self.side} is not allowed: a positive multiple of {step}")

    def build(self, seed: int) -> nn.Module:
        """Patches [b, 3, side, side] -> logits [b, 1, side, side], drawn from `seed`."""
        from monai.networks.nets.unet import UNet

        with seeded(seed):
            net = UNet(
                spatial_dims=2,
                in_channels=3,
                out_channels=1,
                channels=self.channels,
                strides=(2,) * (len(self.channels) - 1),
                num_res_units=2,
                act="RELU",
                norm="BATCH",
            )
        return net.to(memory_format=torch.channels_last)


def prepared(pixels: Pixels, window: float = 1 / 16) -> Tensor:
    """uint8 [h, w, 3] -> float32 [3, h, w]: how far a value is from those around it.

    Per colour (x - m) / (s + 4) with mean m and standard deviation s of a square around the pixel
    whose side is `window` of the picture's shorter one: light that differs over the picture is
    gone, thin structures stay. The 4 (of 255) keeps noise in even regions small (our choice).

    >>> flat = np.full((32, 32, 3), 90, dtype=np.uint8)
    >>> float(prepared(flat).abs().max())
    0.0
    """
    from scipy.ndimage import uniform_filter

    side = max(3, round(window * min(pixels.shape[:2])))
    x = pixels.astype(np.float64)
    mean = uniform_filter(x, size=(side, side, 0), mode="nearest")
    square = uniform_filter(x * x, size=(side, side, 0), mode="nearest")
    spread = np.sqrt(np.clip(square - mean**2, 0, None))
    return torch.from_numpy(((x - mean) / (spread + 4)).astype(np.float32)).permute(2, 0, 1)


def pairs(cases: Sequence[Case], settings: PatchUNet) -> list[Pair]:
    """All pictures, prepared, with their masks, each side at least that of a patch."""
    found = []
    for case in cases:
        picture, mask = case.read()
        there = torch.from_numpy(mask)[None].float()
        found.append((prepared(picture.pixels, settings.window), there))
    return [(_at_least(x, settings.side), _at_least(y, settings.side)) for x, y in found]


def _at_least(plane: Tensor, side: int) -> Tensor:
    below, beside = (max(side - n, 0) for n in plane.shape[-2:])
    return F.pad(plane, (0, beside, 0, below))


def patches(given: Sequence[Pair], settings: PatchUNet, generator: Generator) -> Iterator[Pair]:
    """Endless batches [batch, 3, side, side] and [batch, 1, side, side] from random places.

    Each patch in one of the eight positions of a square, drawn at random.
    """

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    def one() -> Pair:
        x, y = given[below(len(given))]
        top, left = (below(n - settings.side + 1) for n in y.shape[-2:])
        there = (..., slice(top, top + settings.side), slice(left, left + settings.side))
        quarters, flip = below(4), [-1] * below(2)
        return tuple(torch.rot90(plane[there], quarters, (-2, -1)).flip(flip) for plane in (x, y))  # type: ignore[return-value]

    while True:
        seen, marked = zip(*[one() for _ in range(settings.batch)], strict=True)
        yield torch.stack(seen), torch.stack(marked)


def train(
    net: nn.Module,
    given: Sequence[Pair],
    settings: PatchUNet,
    loss: Loss,
    *,
    seed: int,
    steps: int | None = None,
    cpu_seconds: float | None = None,
) -> list[float]:
    """Train in place for so many steps, or CPU seconds of this process; the loss of every step.

    The learning rate rises over the first tenth of either, then falls as a cosine to 0: with a
    limit of time, a slower machine takes fewer steps on the same curve. The trained network is in
    evaluation mode. Raises `AdaptError` unless exactly one limit is given.
    """
    if (steps is None) == (cpu_seconds is None):
        raise AdaptError("give steps or cpu_seconds")
    optimizer = AdamW(net.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    source = patches(given, settings, Generator().manual_seed(seed))
    losses: list[float] = []
    begin = time.process_time()
    net.train()
    while (done := _done(len(losses), steps, time.process_time() - begin, cpu_seconds)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * warmup_cosine(int(done * _TICKS), _TICKS, 0.1)
        losses.append(_step(net, optimizer, loss, *next(source)))
    net.eval()
    return losses


def _done(taken: int, steps: int | None, spent: float, cpu_seconds: float | None) -> float:
    """The share of the run that lies behind."""
    return taken / steps if steps is not None else spent / (cpu_seconds or 1.0)


def _step(net: nn.Module, optimizer: AdamW, loss: Loss, seen: Tensor, marked: Tensor) -> float:
    found = loss(net(seen.contiguous(memory_format=torch.channels_last)), marked)
    optimizer.zero_grad()
    found.backward()
    optimizer.step()
    return float(found.detach())


@torch.inference_mode()
def segment(net: nn.Module, pixels: Pixels, settings: PatchUNet) -> Tensor:
    """Logits [h, w] of a whole picture, from overlapping windows of the size of a patch (MONAI)."""
    from monai.inferers.utils import sliding_window_inference

    seen = prepared(pixels, settings.window)[None]
    found: Any = sliding_window_inference(
        seen, (settings.side, settings.side), settings.batch, net, settings.overlap, mode="gaussian"
    )
    logits: Tensor = found[0, 0]
    return logits
