"""A small network that hears which noise is in a clip, and how loud: category and SNR.

It reads the log-mel of the noisy clip, before Whisper and once per utterance. The idea and the
10-block network are those of arXiv 2502.01709, which trains one network per question; the small
network and the trunk with two heads are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import container
from ..core.errors import AdaptError, StoreError
from ..core.sets import all_finite, check_tensors

WIDTH = 64
_STAGES = (16, 32, 64, WIDTH)


class Estimate(NamedTuple):
    """What the selector says of a batch: logits [b, classes] and SNR in dB [b].

    Without that head, logits are [b, 0] and the SNR is NaN.
    """

    logits: Tensor
    snr_db: Tensor


class Selector(nn.Module):
    """Log-mel [b, mels, frames] of any length -> logits of the classes, SNR in dB.

    By default four 3x3 convolutions of stride 2 (16, 32, 64, 64 channels; batch norm, ReLU), the
    mean over time and frequency, 64-64 with ReLU, one head each: 64,885 parameters for four
    classes. `residual_blocks=10` is a network as in the paper: so many blocks of 64 channels at
    full resolution; with one head 709,380 (four classes, `snr=False`) or 709,185 parameters
    (no classes).

    >>> selector = Selector(["babble", "music", "noise", "side"])
    >>> sum(p.numel() for p in selector.parameters())
    64885
    >>> selector.eval()(torch.zeros(2, 80, 100)).logits.shape
    torch.Size([2, 4])
    """

    def __init__(self, classes: Sequence[str], snr: bool = True, residual_blocks: int = 0) -> None:
        super().__init__()
        if len(set(classes)) != len(classes) or not (classes or snr) or residual_blocks < 0:
            raise AdaptError(
                f"a selector of classes {list(classes)}, snr {snr}, {residual_blocks} residual "
                "blocks is not allowed: names that differ, or an SNR head; no negative count"
            )
        self.classes = tuple(classes)
        self.residual_blocks = residual_blocks
        if residual_blocks:
            widths = [1, *[WIDTH] * residual_blocks]
            self.trunk = nn.ModuleList(map(ResidualBlock, widths[:-1], widths[1:]))
        else:
            self.trunk = nn.ModuleList(map(Stage, (1, *_STAGES[:-1]), _STAGES))
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.category = nn.Linear(WIDTH, len(classes)) if classes else None
        self.snr = nn.Linear(WIDTH, 1) if snr else None

    def forward(self, mel: Tensor, frames: Tensor | None = None) -> Estimate:
        """`frames` [b] are those that a clip really has: what pads it to the batch is not heard."""
        pooled = self._pooled(mel, frames)
        hidden = F.relu(self.hidden(pooled))
        logits = self.category(hidden) if self.category else hidden[:, :0]
        snr = 10 * self.snr(hidden)[:, 0] if self.snr else hidden[:, 0] * torch.nan
        return Estimate(logits, snr)

    def _pooled(self, mel: Tensor, frames: Tensor | None) -> Tensor:
        """[b, mels, t] -> [b, 64]. Whisper's mel keeps the loudness of a clip; here it goes."""
        if frames is None:
            frames = torch.full((len(mel),), mel.shape[-1], device=mel.device)
        level = mel - mel.amax((1, 2), keepdim=True) + 1  # 80 dB: from -1 to 1
        x = _until(level.unsqueeze(1), frames)
        for stage in self.trunk:
            x, frames = stage(x, frames)
        return x.mean(2).sum(-1) / frames[:, None]

    def record(self) -> dict[str, Any]:
        """What builds the network again."""
        return {
            "classes": list(self.classes),
            "snr": self.snr is not None,
            "residual_blocks": self.residual_blocks,
        }


class Stage(nn.Module):
    """ReLU(BN(conv(x))) of stride 2; zeros after each layer are its padding at a clip's end."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        frames = (frames + 1) // 2
        return _until(F.relu(self.norm(self.convolution(x))), frames), frames


class ResidualBlock(nn.Module):
    """ReLU(BN(conv(ReLU(BN(conv(x))))) + x), a 1x1 convolution of x where the width changes."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, padding=1)
        self.first_norm = nn.BatchNorm2d(outside)
        self.second = nn.Conv2d(outside, outside, 3, padding=1)
        self.second_norm = nn.BatchNorm2d(outside)
        self.skip = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        inner = _until(F.relu(self.first_norm(self.first(x))), frames)
        inner = self.second_norm(self.second(inner))
        return _until(F.relu(inner + self.skip(x)), frames), frames


def _until(x: Tensor, frames: Tensor) -> Tensor:
    """[b, ..., t] with zeros from each clip's end on."""
    if bool((frames == x.shape[-1]).all()):
        return x
    inside = torch.arange(x.shape[-1], device=x.device) < frames[:, None]
    return x * inside[:, None, None]


def save_selector(selector: Selector, path: Path, about: Mapping[str, Any]) -> None:
    """Write the network with its classes, and what else belongs to it, into one file."""
    record = {"kind": "selector", **selector.record(), "about": dict(about)}
    container.write(path, record, selector.state_dict())


def read_selector(path: Path) -> tuple[Selector, dict[str, Any]]:
    """(selector in eval mode, what was said about it); raises `StoreError` for anything else."""
    record, tensors = container.read(path)
    if record.get("kind") != "selector":
        raise StoreError(f"{path} holds no selector")
    try:
        made = Selector(record["classes"], record["snr"], record["residual_blocks"])
        check_tensors(tensors, made.state_dict(), str(path))
        about = dict(record["about"])
    except AdaptError as error:
        raise StoreError(str(error)) from error
    except (LookupError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is damaged: its record lacks or misstates {error}") from error
    if not all(map(all_finite, tensors.values())):
        raise StoreError(f"{path} is refused: it holds NaN or infinity")
    made.load_state_dict(tensors)
    return made.eval(), about
