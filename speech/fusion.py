"""Audio-visual fusion before Whisper: a noisy mel and a mouth video become a mel that looks clean.

Source: the fusion module of arXiv 2312.13873, used by 2502.01709. The sizes, the windows and the
mathematics are the paper's and its public configuration's (which give 13,190,880 parameters); the
code is ours. Ours as well: heads are split as multi-head attention means it (the public code views
[t, h d] as [h, t, d], by which a frame reaches 14 neighbours, not 160; `public_layout` does the
same), and padding up to whole windows is hidden from attention, so that a clip's end is its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import AdaptError
from .audio_front import AudioFront
from .video_front import MELS_PER_FRAME, FeatureFront, VideoFront


@dataclass(frozen=True, kw_only=True)
class FusionSizes:
    """The sizes of a fusion module; the defaults are the published ones.

    `features`: None for mouth crops [b, 1, f, crop, crop], else the width of precomputed features
    [b, f, features]. `window` is in mel frames (1.6 s). `zero_fill`: past a clip's end Whisper gets
    zeros, as in the public code; else the noisy mel's own silence, which zero is not.

    >>> FusionSizes.from_json(FusionSizes(layers=2).to_json()) == FusionSizes(layers=2)
    True
    """

    mels: int = 80
    audio_channels: int = 128
    audio_blocks: int = 7
    video_channels: tuple[int, int, int, int] = (64, 128, 256, 256)
    video_blocks: tuple[int, int, int, int] = (2, 2, 2, 3)
    inner: int = 64
    crop: int = 88
    layers: int = 12
    heads: int = 12
    window: int = 160
    features: int | None = None
    public_layout: bool = False
    zero_fill: bool = False

    def __post_init__(self) -> None:
        for name in ("video_channels", "video_blocks"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or len(value) != 4 or not _counts(value):
                raise AdaptError(f"fusion: {name}={value!r} is not allowed: 4 whole numbers from 1")
            object.__setattr__(self, name, tuple(value))  # a list when read from JSON
        plain = {f.name for f in fields(self)} - {"video_channels", "video_blocks"}
        plain -= {"public_layout", "zero_fill"}
        for name in sorted(plain - ({"features"} if self.features is None else set())):
            if not _counts([getattr(self, name)]):
                raise AdaptError(
                    f"fusion: {name}={getattr(self, name)!r} is not allowed: a whole number from 1"
                )
        if self.audio_blocks < 2 or self.window % 4:
            raise AdaptError("fusion: audio_blocks is at least 2 and window a multiple of 4")

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they come back from JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FusionSizes:
        """What `to_json` wrote; unknown names are refused."""
        try:
            return cls(**data)
        except TypeError as error:
            raise AdaptError(f"fusion: the sizes {data!r} cannot be read: {error}") from error


class Fusion(nn.Module):
    """(mel [b, mels, 4 f], video of f frames) -> mel [b, mels, 4 f], what Whisper's encoder takes.

    a, v [b, 4 f, mels] come from the audio and the video front. In windows of 160 frames that
    overlap by half, with a0 = a: x = LN(MHA(q = v, k = val = a_i) + a_i), a_{i+1} = LN(W x + x) for
    12 layers; each window gives its middle half, the first and last also their ends; then a linear
    map. `AdaptError` for lengths that do not fit: one video frame is 4 mel frames (640 samples).

    >>> fusion = Fusion(FusionSizes(audio_channels=4, audio_blocks=2, features=8, layers=1))
    >>> fusion(torch.randn(2, 80, 200), torch.randn(2, 50, 8)).shape
    torch.Size([2, 80, 200])
    """

    def __init__(self, sizes: FusionSizes | None = None) -> None:
        super().__init__()
        s = self.sizes = sizes or FusionSizes()
        self.audio = AudioFront(s.mels, s.audio_channels, s.audio_blocks)
        self.video: nn.Module
        if s.features is None:
            self.video = VideoFront(s.mels, s.video_channels, s.video_blocks, s.inner)
        else:
            self.video = FeatureFront(s.features, s.mels)
        self.attention = WindowedFusion(s.mels, s.layers, s.heads, s.window, s.public_layout)

    def forward(self, mel: Tensor, video: Tensor) -> Tensor:
        self.check(mel, video)
        fused: Tensor = self.attention(self.audio(mel), self.video(video))
        return fused.transpose(1, 2)

    def restored(self, mel: Tensor, video: Tensor, frames: Tensor | None = None) -> Tensor:
        """Whisper's input: mel [b, mels, t], fused where video is and the clips [b] have frames."""
        span = MELS_PER_FRAME * self._pictures(video)
        if span > mel.shape[2]:
            raise AdaptError(
                f"fusion: the video lasts {span} mel frames, but the mel has {mel.shape[2]}"
            )
        rest = torch.zeros_like(mel) if self.sizes.zero_fill else mel
        fused = torch.cat([self(mel[..., :span], video).to(mel.dtype), rest[..., span:]], dim=-1)
        if frames is None:
            return fused
        index = torch.arange(mel.shape[2], device=mel.device)
        return torch.where((index < frames.to(mel.device)[:, None])[:, None], fused, rest)

    def check(self, mel: Tensor, video: Tensor) -> None:
        """Refuse what does not fit together, in one line."""
        s = self.sizes
        if mel.ndim != 3 or mel.shape[1] != s.mels:
            raise AdaptError(f"fusion: the mel is {list(mel.shape)}, expected [batch, {s.mels}, t]")
        frames = self._pictures(video)
        tail = [frames, s.features] if s.features else [1, frames, s.crop, s.crop]
        if frames == 0 or list(video.shape) != [len(mel), *tail]:
            wanted = f"f, {s.features}" if s.features else f"1, f, {s.crop}, {s.crop}"
            raise AdaptError(
                f"fusion: the video is {list(video.shape)}, expected [{len(mel)}, {wanted}]"
            )
        if mel.shape[2] != MELS_PER_FRAME * frames:
            raise AdaptError(
                f"fusion: {frames} video frames at 25 Hz are {MELS_PER_FRAME * frames} mel frames,"
                f" but the mel has {mel.shape[2]}: cut both to the same time (`trimmed`)"
            )

    def _pictures(self, video: Tensor) -> int:
        axis = 1 if self.sizes.features else 2
        return video.shape[axis] if video.ndim > axis else 0


class WindowedFusion(nn.Module):
    """a, v [b, t, d] -> [b, t, d]: attention in windows; 3,822,960 parameters as published.

    >>> sum(p.numel() for p in WindowedFusion(80, 12, 12, 160).parameters())
    3822960
    """

    def __init__(
        self, width: int, layers: int, heads: int, window: int, public_layout: bool = False
    ) -> None:
        super().__init__()
        self.window = window
        self.audio, self.video = nn.Linear(width, width), nn.Linear(width, width)
        self.layers = nn.ModuleList(FusionLayer(width, heads, public_layout) for _ in range(layers))
        self.out = nn.Linear(width, width)

    def forward(self, a: Tensor, v: Tensor) -> Tensor:
        batch, frames, width = a.shape
        x, q = (self._windows(t) for t in (self.audio(a), self.video(v)))
        number = len(x) // batch
        ones = torch.ones(1, frames, 1, device=a.device)
        seen = self._windows(ones).squeeze(-1).bool().repeat(batch, 1)  # [b n, window]
        for layer in self.layers:
            x = layer(q, x, seen)
        joined = self._joined(x.view(batch, number, self.window, width))
        fused: Tensor = self.out(joined[:, :frames])
        return fused

    def _windows(self, x: Tensor) -> Tensor:
        """[b, t, d] -> [b n, window, d], zeros up to a whole number of half windows."""
        half = self.window // 2
        whole = max(self.window, -(-x.shape[1] // half) * half)
        padded = F.pad(x, (0, 0, 0, whole - x.shape[1]))
        return padded.unfold(1, self.window, half).transpose(2, 3).flatten(0, 1)

    def _joined(self, y: Tensor) -> Tensor:
        """[b, n, window, d] -> [b, t, d]: middle halves, and the ends of the first and last."""
        quarter = self.window // 4
        middle = y[:, :, quarter : 3 * quarter].flatten(1, 2)
        return torch.cat([y[:, 0, :quarter], middle, y[:, -1, 3 * quarter :]], dim=1)


class FusionLayer(nn.Module):
    """x = LN(MHA(q, a, a) + a); LN(W x + x), in windows [n, window, d]."""

    def __init__(self, width: int, heads: int, public_layout: bool = False) -> None:
        super().__init__()
        self.heads, self.public_layout = heads, public_layout
        self.query, self.key, self.value = (nn.Linear(width, heads * width) for _ in range(3))
        self.out = nn.Linear(heads * width, width)
        self.linear = nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, q: Tensor, a: Tensor, seen: Tensor) -> Tensor:
        """q from the video, a the running audio; `seen` [n, window] is False where padded."""
        mask = None if self.public_layout else seen[:, None, None]
        q, k, value = (self._split(t) for t in (self.query(q), self.key(a), self.value(a)))
        heads = F.scaled_dot_product_attention(q, k, value, attn_mask=mask)
        x = self.norms[0](self.out(self._merged(heads)) + a)
        y: Tensor = self.norms[1](self.linear(x) + x)
        return y

    def _split(self, x: Tensor) -> Tensor:
        """[n, t, h d] -> [n, h, t, d]; each head has the whole width d."""
        n, t, inner = x.shape
        if self.public_layout:
            return x.reshape(n, self.heads, t, inner // self.heads)
        return x.view(n, t, self.heads, -1).transpose(1, 2)

    def _merged(self, x: Tensor) -> Tensor:
        n, heads, t, width = x.shape
        x = x if self.public_layout else x.transpose(1, 2)
        return x.reshape(n, t, heads * width)


def trimmed(mel: Tensor, video: Tensor, most: int = 5) -> tuple[Tensor, Tensor]:
    """Cut a mel [..., t] and its video (frames first, [f, ...]) to the time that both have.

    Cameras and microphones stop apart; more than `most` video frames (0.2 s) is refused.

    >>> mel, video = trimmed(torch.zeros(80, 323), torch.zeros(81, 88, 88))
    >>> mel.shape[-1], len(video)
    (320, 80)
    """
    heard, shown = mel.shape[-1] // MELS_PER_FRAME, len(video)
    if abs(heard - shown) > most or min(heard, shown) == 0:
        raise AdaptError(
            f"the mel's {mel.shape[-1]} frames are {heard} video frames, but the video has {shown}:"
            f" they may differ by {most}"
        )
    frames = min(heard, shown)
    return mel[..., : MELS_PER_FRAME * frames], video[:frames]


def _counts(values: Any) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values)
