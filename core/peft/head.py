"""Tensors of whole modules in a PEFT folder: a task's head, or an embedding's table."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..drawer import DRAWER
from ..errors import StoreError
from .config import PeftConfig


def read_head(
    backbone: nn.Module, config: PeftConfig, others: Mapping[str, Tensor], adapted: Collection[str]
) -> dict[str, Tensor]:
    """Tensors of whole modules that travel with the set; PEFT writes them into the backbone."""
    own = backbone.state_dict()
    head: dict[str, Tensor] = {}
    for key, tensor in others.items():
        path, _, parameter = key.rpartition(".")
        plain = path.removesuffix(".base_layer")
        saved = path.endswith(tuple(config.saved_modules))
        if plain != path and plain in adapted:  # an embedding's table, which PEFT saves beside
            path = plain
        here = own.get(f"{path}.{parameter}")
        if here is None and not saved:
            raise StoreError(f"tensor {key!r} belongs to no module of it and to no modules_to_save")
        if here is not None and not _same(tensor, here):
            raise StoreError(
                f"it holds {path}.{parameter} {list(tensor.shape)}, which is not the backbone's:"
                " load that tensor into the backbone first, as PEFT would"
            )
        if saved:
            head[key] = tensor
    _refuse_incomplete(backbone, config, head)
    return head


def _same(tensor: Tensor, here: Tensor) -> bool:
    return tensor.dtype == here.dtype and torch.equal(tensor, here.detach().cpu())


def _refuse_incomplete(backbone: nn.Module, config: PeftConfig, head: Mapping[str, Tensor]) -> None:
    """PEFT wraps each module whose path ends so, and needs all of its tensors."""
    for name in config.saved_modules:
        if not any(key.rpartition(".")[0].endswith(name) for key in head):
            raise StoreError(f"modules_to_save names {name!r}, of which there are no tensors")
        for path, module in backbone.named_modules():
            if path.endswith(name) and DRAWER not in path.split("."):
                for key in module.state_dict(prefix=f"{path}."):
                    if key not in head:
                        raise StoreError(f"modules_to_save names {name!r}: {key!r} is missing")
