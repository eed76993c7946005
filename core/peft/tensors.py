"""PEFT's tensors: the names and shapes of `adapter_model.safetensors` at each kind of layer.

=================  ===============================================  ======================
kind of layer      key behind `base_model.model.<path>`             shape in the file
=================  ===============================================  ======================
linear, Conv1D     `.lora_A.weight`, `.lora_B.weight`               [r, d_in], [d_out, r]
conv1d, conv2d     the same                            [r, c_in, *k], [c_out, r, 1, ..]
embedding          `.lora_embedding_A`, `.lora_embedding_B`         [r, number], [dim, r]
DoRA, all kinds    `.lora_magnitude_vector`            [d_out]; conv: [1, c_out, 1, ..]
AdaLoRA            `.lora_A`, `.lora_B`, `.lora_E`     [r, d_in], [d_out, r], [r, 1]
=================  ===============================================  ======================

AdaLoRA's layers are linear, Conv1D and conv2d, whose kernel stays flat in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import StoreError
from .config import TENSORS

PREFIX = "base_model.model."
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LONGEST_NAME = 1000
_KINDS = {
    "LORA": ("linear", "transposed linear", "conv1d", "conv2d", "embedding"),
    "ADALORA": ("linear", "transposed linear", "conv2d"),
}


@dataclass(frozen=True)
class Place:
    """One adapted layer as PEFT sees it: W [d_out, d_in], and its kernel if it is a convolution."""

    peft_type: str
    path: str
    kind: str
    d_out: int
    d_in: int
    kernel: tuple[int, ...] = ()  # [c_in, *k]

    def key(self, factor: str) -> str:
        """The name in the file of A, B, m or E."""
        if factor == "m":
            end = "lora_magnitude_vector"
        elif self.kind == "embedding":
            end = f"lora_embedding_{factor}"
        else:
            end = f"lora_{factor}" + (".weight" if self.peft_type == "LORA" else "")
        return f"{PREFIX}{self.path}.{end}"

    def shape(self, factor: str, rank: int) -> tuple[int, ...]:
        """The shape in the file; ours has the same numbers in the same order."""
        kernel = self.kernel if self.peft_type == "LORA" else ()  # AdaLoRA keeps it flat
        ones = (1,) * (len(kernel) - 1) if kernel else ()
        shapes = {
            "A": (rank, *(kernel or (self.d_in,))),
            "B": (self.d_out, rank, *ones),
            "m": (1, self.d_out, *ones) if kernel else (self.d_out,),
            "E": (rank, 1),
        }
        return shapes[factor]


def own_shape(shape: Sequence[int], factor: str, rank: int) -> tuple[int, ...]:
    """The shape of an adapter's own tensor at a weight [d_out, d_in]."""
    d_out, d_in = shape
    shapes = {"A": (rank, d_in), "B": (d_out, rank), "m": (d_out,), "E": (rank,)}
    return shapes[factor]


def refuse_layer(peft_type: str, path: str, kind: str, module: nn.Module) -> None:
    """PEFT has no adapter for every kind, and its convolutions leave settings out."""
    refuse_kind(peft_type, path, kind)
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return
    plain = module.padding_mode == "zeros" and set(module.dilation) == {1} and module.groups == 1
    if not plain:
        raise StoreError(
            f"{path} is a {kind} with groups={module.groups}, dilation={module.dilation} and"
            f" padding_mode={module.padding_mode!r}: PEFT's branch ignores these, so its sum is no"
            " change of the weight; allowed: 1, 1 and 'zeros'"
        )


def refuse_kind(peft_type: str, path: str, kind: str) -> None:
    """PEFT has no adapter of this type for this kind of layer."""
    kinds = _KINDS[peft_type]
    if kind not in kinds:
        raise StoreError(f"{path} is a {kind}; PEFT has {peft_type} for {', '.join(kinds)}")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder by name, without `.default`; what is doubtful is refused."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / TENSORS
    if not path.is_file():
        pickled = sorted(file.name for file in folder.glob("adapter_model.*"))
        hint = f" but {pickled[0]}: only safetensors are read, never a pickle" if pickled else ""
        raise StoreError(f"{folder} has no {TENSORS}{hint}")
    try:
        found = load(path.read_bytes())
    except (SafetensorError, OSError, LookupError, ValueError, TypeError) as error:
        raise StoreError(f"{path} is damaged or not a safetensors file") from error
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.items():
        _refuse_odd(name, tensor, path)
        plain = re.sub(r"(\.lora_\w+)\.default(\.weight)?$", _without_default, name)
        if plain in tensors:
            raise StoreError(f"{path}: {name!r} is there twice, with and without '.default'")
        tensors[plain] = tensor
    return tensors


def _without_default(found: re.Match[str]) -> str:
    magnitude = found[1] == ".lora_magnitude_vector"  # in memory it is a module with a weight
    return found[1] if magnitude else found[1] + (found[2] or "")


def _refuse_odd(name: str, tensor: Tensor, path: Path) -> None:
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise StoreError(f"{path}: a tensor's name is no plain text: {name[:40]!r}")
    if not name.startswith(PREFIX):
        raise StoreError(f"{path}: tensor {name!r} does not start with {PREFIX!r}")
    if ".lora_" in name and tensor.dtype not in _FLOATS:
        raise StoreError(f"{path}: {name!r} is {tensor.dtype}; allowed: {_FLOATS}")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise StoreError(f"{path}: {name!r} holds NaN or infinity")


def by_path(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({path: {key: tensor}} of the adapters, the other tensors without their prefix)."""
    adapters: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, found, _ = name.rpartition(".lora_")
        if found:
            adapters.setdefault(path.removeprefix(PREFIX), {})[name] = tensor
        else:
            others[name.removeprefix(PREFIX)] = tensor
    return adapters, others
