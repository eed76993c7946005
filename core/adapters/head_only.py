"""Head only: the backbone as it is; the baseline that trains nothing inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class HeadOnly(Recipe):
    """No adapters: what a task's own head learns on the frozen feature. Sites are refused.

    >>> HeadOnly().default_at(nn.Linear(2, 3))
    ()
    """

    def default_at(self, model: nn.Module) -> Sequence[str]:
        """Nothing."""
        return ()
