"""The proximal step of an L1 term: coefficients become exactly 0 and stay there.

Adam with an L1 term in its loss only hovers near zero. Here the optimiser does not see the term;
after its step every coefficient moves lr * l1 towards zero and stops there (soft thresholding).
Like AdamW's weight decay it is decoupled: the gradient's scale plays no part. A gradient that keeps
its sign moves a coefficient by up to lr per step of Adam, so l1 is the share of that which it must
reach to leave zero, and from 1 on nothing leaves it. S2-LoRA uses it (`S2LoRA`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.optim import Optimizer

from ..recipe import require, steps_of

L1, WARMUP = "l1", "l1_warmup"


def sparse_group(group: dict[str, Any], l1: float, warmup: int | float) -> dict[str, Any]:
    """An optimiser group whose parameters `proximal_step` shrinks.

    `warmup`: the steps (a whole number), or the share of all, in which it does not.
    """
    return {**group, L1: l1, WARMUP: warmup}


@torch.no_grad()
def proximal_step(optimizer: Optimizer, step: int, total: int | None = None) -> None:
    """p <- sign(p) max(|p| - lr * l1, 0) for the groups with an "l1", at their learning rate now.

    Call it after optimiser step `step` (1-based) of `total`, before the rate changes, as
    `AdaptedModule` does; other groups are left alone. It keeps nothing between steps: a resumed
    run goes on alike. Raises `AdaptError` when a warm-up is a share and `total` is not known.

    >>> p = torch.nn.Parameter(torch.tensor([0.3, -0.05, 0.1]))
    >>> optimizer = torch.optim.SGD([sparse_group({"params": [p]}, l1=1.0, warmup=0)], lr=0.1)
    >>> proximal_step(optimizer, step=1)
    >>> p.data
    tensor([0.2000, 0.0000, 0.0000])
    """
    for group in optimizer.param_groups:
        if L1 not in group or step <= _warmup(group[WARMUP], total):
            continue
        threshold = float(group["lr"]) * group[L1]
        for p in group["params"]:
            p.copy_(F.softshrink(p, threshold)).add_(0.0)  # -0 becomes 0


def _warmup(duration: int | float, total: int | None) -> int:
    if isinstance(duration, int):
        return duration
    known = (
        "proximal_step(optimizer, step, total) needs the number of steps: its warm-up is a share"
    )
    require(total is not None or duration == 0, known)
    return steps_of(duration, total or 0)
