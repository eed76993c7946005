"""The names and shapes in DUSt3R's published files: what they say about the network they hold.

Facts read off the files' keys and the authors' code (naver/dust3r, naver/croco, CC BY-NC-SA 4.0).
Our modules carry the published names; only duplicates and wrappers are renamed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..core.errors import AdaptError
from .dust3r import Dust3rSize
from .heads import OUTPUTS, PATCH, HeadKind

HEAD_WIDTH = 64  # of every published attention head: 1024 / 16 and 768 / 12

# (as a file may say it, as we do). The fusion's first convolutions are held under two names.
_RENAMED = (
    (r"module\.(.*)", r"\1"),  # a wrapper of training on several GPUs
    (r"(.*\.scratch)\.layer_rn\.0\.(.*)", r"\1.layer1_rn.\2"),
    (r"(.*\.scratch)\.layer_rn\.1\.(.*)", r"\1.layer2_rn.\2"),
    (r"(.*\.scratch)\.layer_rn\.2\.(.*)", r"\1.layer3_rn.\2"),
    (r"(.*\.scratch)\.layer_rn\.3\.(.*)", r"\1.layer4_rn.\2"),
)
_FOREIGN = {
    "head_local_features": "MASt3R: its second head's descriptors are not in our network",
    "aggregator": "VGGT, which takes all views at once",
    "prediction_head": "CroCo before DUSt3R's training: it predicts pixels, not points",
}


def our_name(published: str) -> str:
    """The key of ours that a published key stands for.

    >>> our_name("module.downstream_head1.dpt.scratch.layer_rn.2.weight")
    'downstream_head1.dpt.scratch.layer3_rn.weight'
    """
    name = published
    for pattern, ours in _RENAMED:
        name = re.sub(rf"^{pattern}$", ours, name)
    return name


def renamed(published: Mapping[str, object]) -> dict[str, Tensor]:
    """A published state under our names, in fp32.

    Raises `AdaptError` for what is no tensor, another network's keys, and two names of one weight
    whose numbers differ.
    """
    state: dict[str, Tensor] = {}
    for key, value in published.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise AdaptError(f"the state's {key!r} is a {type(value).__name__}, not a tensor")
        for word, what in _FOREIGN.items():
            if word in key:
                raise AdaptError(f"the file holds {key!r}: that is {what}")
        name, tensor = our_name(key), value.float()
        if name in state and not torch.equal(state[name], tensor):
            raise AdaptError(f"{key!r} and another name of {name!r} hold different numbers")
        state[name] = tensor
    return state


def size_from(state: Mapping[str, Tensor], heads: tuple[int, int] | None = None) -> Dust3rSize:
    """The size of the network that a state under our names holds.

    `heads`: of an attention of encoder and decoders, which no shape tells; None: 64 numbers each.
    Raises `AdaptError` where a part is missing.
    """
    patches = _of(state, "patch_embed.proj.weight", 4)
    if tuple(patches.shape[1:]) != (3, PATCH, PATCH):
        raise AdaptError(f"the file's patches are {list(patches.shape[1:])}, not [3, 16, 16]")
    wide, width = len(patches), len(_of(state, "decoder_embed.weight", 2))
    kind: HeadKind = "dpt" if any(".dpt." in name for name in state) else "linear"
    if kind == "linear":
        rows = len(_of(state, "downstream_head1.proj.weight", 2))
        if rows != OUTPUTS * PATCH**2:
            raise AdaptError(f"the file's linear head has {rows} rows, not {OUTPUTS * PATCH**2}")
    many = heads or (max(1, wide // HEAD_WIDTH), max(1, width // HEAD_WIDTH))
    size = Dust3rSize(
        encoder_width=wide,
        encoder_depth=_count(state, "enc_blocks"),
        encoder_heads=many[0],
        width=width,
        depth=_count(state, "dec_blocks"),
        heads=many[1],
        head=kind,
    )
    return size if kind == "linear" else _with_fusion(size, state)


def _with_fusion(size: Dust3rSize, state: Mapping[str, Tensor]) -> Dust3rSize:
    scratch = "downstream_head1.dpt.scratch"
    layers = [_of(state, f"{scratch}.layer{n}_rn.weight", 4).shape for n in range(1, 5)]
    widths = tuple(shape[1] for shape in layers)
    return replace(size, layer_widths=widths, features=layers[0][0])


def _of(state: Mapping[str, Tensor], name: str, axes: int) -> Tensor:
    if name not in state or state[name].ndim != axes:
        found = f"{list(state[name].shape)}" if name in state else "missing"
        raise AdaptError(f"not a DUSt3R file: {name!r} is {found}, not a tensor of {axes} axes")
    return state[name]


def _count(state: Mapping[str, Tensor], blocks: str) -> int:
    """How many blocks there are; where a number is left out, loading says so."""
    numbers = {name.split(".")[1] for name in state if name.startswith(f"{blocks}.")}
    if not numbers:
        raise AdaptError(f"not a DUSt3R file: it has no {blocks!r}")
    return len(numbers)
