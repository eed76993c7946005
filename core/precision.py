"""Products in the dtypes that are there, whatever autocast says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def widened(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + s B A in the wider dtype of W and the factors."""
    dtype = torch.promote_types(w.dtype, a.dtype)
    with without_autocast(w):
        return torch.addmm(w.to(dtype), b.to(dtype), a.to(dtype), alpha=scale)


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """Compute in the dtypes that are there (the meta device has no autocast to switch off)."""
    device = t.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
