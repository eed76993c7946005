"""The residual state that enters a transformer block's MLP branch, for adapters parallel to it.

The branch begins with its norm (pre-norm blocks) or with the MLP (post-norm blocks, Swin V2): what
the first of the two is called with is that state, in either layout.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AdaptError, SiteError

# Children of a block that its MLP branch may begin with, norm or MLP: timm, open_clip and GPT-2,
# whisper, transformers' ViT, Whisper and wav2vec 2, torch's encoder and decoder layers.
_BRANCH = (
    *("norm2", "mlp", "ln_2", "mlp_ln", "layernorm_after", "final_layer_norm", "fc1"),
    *("feed_forward", "linear1", "norm3"),
)


class FFNInput:
    """Catches the state during a block's call; one per adapted block."""

    def __init__(self, block: nn.Module, path: str) -> None:
        found = {name: child for name, child in block.named_children() if name in _BRANCH}
        if "norm3" in found:  # a third norm makes the second that of cross-attention
            found.pop("norm2", None)
        if not found:
            names = ", ".join(name for name, _ in block.named_children())
            raise SiteError(
                f"{path} has no MLP branch that we know (one of {', '.join(_BRANCH)});"
                f" its children: {names or 'none'}"
            )
        self.path = path
        self._held: dict[int, tuple[Tensor, bool]] = {}  # and whether grad was on
        self._handles = [block.register_forward_pre_hook(self._begin, prepend=True)]
        self._handles += [
            child.register_forward_pre_hook(self._catch, prepend=True, with_kwargs=True)
            for child in found.values()
        ]

    def take(self) -> Tensor | None:
        """The state of the call that is ending, if its branch was called."""
        state, with_grad = self._held.pop(_caller(), (None, True))
        if torch.is_grad_enabled() and not with_grad:
            raise AdaptError(
                f"{self.path}: its MLP branch ran without grad (a reentrant checkpoint inside the"
                " block?), so no gradient could pass through its input: use_reentrant=False"
            )
        return state

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._held.pop(_caller(), None)  # left behind by a call that raised

    def _catch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = next(iter((*args, *kwargs.values())))
        self._held.setdefault(_caller(), (state, torch.is_grad_enabled()))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}}  # a recomputed branch leaves its state behind


def _caller() -> int:
    # The compiler traces one thread and cannot ask for its number.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
