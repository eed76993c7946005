"""A mixed batch on a GPU: one op reads each set's factors where they lie.

What `gathered` copies for every sample, `multi_lora` looks up, with each set's own rank. It serves
sets without a gain that do not train; the others are gathered there, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .kernels.dispatch import runs_kernel
from .kernels.multi_lora import Sets, multi_lora
from .kernels.segments import Segments, segments
from .layers import FrozenLayer
from .recipe import Branch


@dataclass(frozen=True, eq=False)
class Resident:
    """The branches of several sets at one part of a layer's rows, as the op reads them."""

    layer: FrozenLayer
    sets: Sets

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return self.sets.down.dtype


def serves(layer: FrozenLayer, branches: Sequence[Branch]) -> bool:
    """Whether the op takes these. A choice by names is gathered in compiled code, a stack is not:
    it asks when it is made."""
    if torch.compiler.is_compiling() or not runs_kernel(layer.stored):
        return False
    trains = any(factor.requires_grad for b in branches for factor in (b.down, b.up))
    return not (trains and torch.is_grad_enabled()) and all(b.gain is None for b in branches)


def resident(layer: FrozenLayer, branches: Sequence[Branch]) -> Resident:
    """Copies of the factors, one set's behind the other's, in the dtype of the layer."""
    dtype = layer.stored.dtype
    downs, ups = [b.down.to(dtype) for b in branches], [b.up.to(dtype) for b in branches]
    return Resident(layer, Sets.of(downs, ups, [b.scale for b in branches]))


@dataclass(frozen=True, eq=False)
class Ids:
    """The number of each sample's set, -1 for none, and what follows from it."""

    ids: Tensor  # int64 [batch]
    sets: int
    made: dict[int, Segments] = field(default_factory=dict)

    def segments(self, tokens: int) -> Segments | None:
        """The tiles for samples of so many rows, made once; in compiled code the op makes them."""
        if torch.compiler.is_compiling():
            return None
        if tokens not in self.made:
            with torch.inference_mode(False), torch.no_grad():
                self.made[tokens] = segments(self.ids, self.sets, tokens)
        return self.made[tokens]


@dataclass(frozen=True, eq=False)
class Segmented:
    """What the samples of a batch need at one part of a layer."""

    branches: Resident  # one per set
    ids: Ids

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Samples first; a sample without an adapter keeps its bits."""
        made = self.ids.segments(math.prod(y.shape[1:-1]))
        return multi_lora(x.to(y.dtype), y, self.branches.sets, self.ids.ids, made)
