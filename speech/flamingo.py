"""Whisper-Flamingo: every decoder block looks at video features (arXiv 2406.10082).

The paper fixes: gated cross-attention at the start of each decoder block, a linear map of the
features (AV-HuBERT large: 1024) to Whisper's width times one trained scalar, Whisper frozen and
fine-tuned to noise beforehand, AdamW at 1e-4. Ours: the matrices' start (see
`GatedCrossAttention`), heads of 64 as Whisper has them.

Against the fusion module: the encoder and its states stay those of plain Whisper, the video's
clock is its own, and text is needed to train it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapters.gated_cross_attention import GatedCrossAttention, attending
from ..core.errors import AdaptError
from ..core.sets import AdapterSet
from ..core.training import AdaptedModule
from .backbones import Backbone
from .model import Speech, speech_of
from .names import Layout
from .tokens import IGNORED

TASK = "whisper-flamingo"
_BLOCKS: dict[Layout, str] = {
    "openai": "decoder.blocks.*",
    "transformers": "model.decoder.layers.*",
}
_HEAD = "projection."


class Projection(nn.Module):
    """Features [b, f, features] -> v [b, f, d] = s (W features + b), with a scalar s = 1.

    >>> sum(p.numel() for p in Projection(1024, 768).parameters())  # 1024 d + d + 1
    787201
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, width)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, features: Tensor) -> Tensor:
        width = self.linear.in_features
        if features.ndim != 3 or features.shape[-1] != width:
            raise AdaptError(f"video features are {list(features.shape)}, expected [b, f, {width}]")
        projected: Tensor = self.linear(features) * self.scale
        return projected


def blocks_of(layout: Layout) -> str:
    """The decoder's blocks as a pattern for `attach`."""
    return _BLOCKS[layout]


@contextmanager
def watching(projection: Projection, video: Tensor, seen: Tensor | None = None) -> Iterator[None]:
    """Within: a decoder with a `GatedCrossAttention` set sees features [b, f, features].

    `seen` [b, f] is False where a shorter clip's features are padding.
    """
    with attending(projection(video), seen):
        yield


class SeenClips(NamedTuple):
    """A batch: mel [b, n_mels, t], video features [b, f, d], and a decoder's pairs of tokens."""

    mel: Tensor
    video: Tensor
    inputs: Tensor
    targets: Tensor
    seen: Tensor | None = None


class WhisperFlamingo(AdaptedModule):
    """Trains gated cross-attention and its projection on a frozen Whisper, from clips with text.

    The loss is the cross-entropy of the next token, targets of -100 left out. Batches are
    `SeenClips`. The other settings are `AdaptedModule`'s; its weight decay and rate are the
    paper's, 0.01 and 1e-4.
    """

    def __init__(
        self,
        backbone: Backbone,
        features: int = 1024,
        adapter: GatedCrossAttention | None = None,
        *,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup: float = 0.25,
        **training: Any,
    ) -> None:
        speech = speech_of(backbone.build())
        training |= {"lr": lr, "weight_decay": weight_decay, "warmup": warmup}
        super().__init__(
            speech.model, adapter or GatedCrossAttention(), blocks_of(speech.layout), **training
        )
        self.projection = Projection(features, speech.dims.n_audio_state)
        self.adapters.extra = {"task": TASK, "backbone": backbone.to_json(), "features": features}

    @property
    def speech(self) -> Speech:
        """The backbone with its interface."""
        return speech_of(self.backbone)

    def training_loss(self, batch: SeenClips) -> Tensor:
        with torch.no_grad():  # the encoder is frozen and has no adapters
            states = self.speech.encode(batch.mel)
        with watching(self.projection, batch.video, batch.seen):
            logits = self.speech.logits(batch.inputs, states)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)


def projection_of(made: AdapterSet) -> Projection:
    """The projection that travelled in the file of a set of `WhisperFlamingo`, frozen."""
    if made.extra.get("task") != TASK:
        raise AdaptError(f"set {made.name!r} is no set of Whisper-Flamingo: {made.extra}")
    weight = made.head[f"{_HEAD}linear.weight"]
    projection = Projection(weight.shape[1], weight.shape[0])
    projection.load_state_dict({k.removeprefix(_HEAD): t for k, t in made.head.items()})
    return projection.requires_grad_(False).to(next(made.parameters()).device)
