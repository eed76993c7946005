"""Visual prompt tuning (arXiv 2203.12119): trained tokens beside those of the image."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from ..activation import activate
from ..drawer import find_drawer
from ..errors import SiteError
from ..recipe import Adapter, Recipe, require
from .bottleneck import transformer_blocks

if TYPE_CHECKING:
    from ..layers import FrozenLayer
    from ..sites import Site

_POSITIONS = re.compile(r"(^|\.)(rope|rotary\w*)(\.|$)")
# What a block may raise when it gets tokens that it was not made for.
_UNFIT = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, kw_only=True)
class VPT(Recipe):
    """y = Block([x, P]) without its last p tokens, x [n, t, d] and trained prompts P [p, d].

    Deep (VPT-deep): every block of a list `blocks` has prompts of its own, 12 p d numbers on ViT-B.
    deep=False (VPT-shallow): they enter once, before the first block, and leave after the last: p d
    numbers at the site `blocks`, which must be called as one (nn.Sequential). timm's gradient
    checkpointing, refused when it is on, and `forward_intermediates` call the blocks one by one,
    and then nothing acts. P is uniform in +-v with
    v = sqrt(6 / (3 s^2 + d)) for patches of s = `patch_size` pixels. Neither mergeable nor the
    frozen backbone at the start: attention is shared with the prompts.

    What is known: the start is that of the authors' code, from memory; their dropout and their
    projection of prompts are left out. They insert prompts behind the class token; where blocks
    treat tokens as a set, which is checked, that is the same.

    Raises `AdaptError` for a setting out of range, `SiteError` for a block to which the order or
    the number of its tokens matters (relative positions, windows, causal attention), in which
    tokens do not meet, and for a backbone with rotary positions.

    >>> import timm
    >>> from polyadapt.core import attach
    >>> vit = timm.create_model("vit_tiny_patch16_224", depth=3)
    >>> attach(vit, VPT(prompts=5)).trainable_count()
    2880
    """

    prompts: int = 10
    deep: bool = True
    patch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("prompts", "patch_size"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            require(whole, f"VPT: {name}={value!r} is not allowed: a whole number from 1")

    @property
    def identity(self) -> bool:
        """No: the prompts take a share of the attention from the start."""
        return False

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        if site.kind != "block":
            raise SiteError(f"VPT: {site.name} is a {site.kind}: prompts enter a whole block")
        prompts = torch.zeros(self.prompts, site.shape[0], dtype=torch.float32, device="cpu")
        v = math.sqrt(6 / (3 * self.patch_size**2 + site.shape[0]))
        return VPTAdapter(prompts.uniform_(-v, v, generator=generator), site.name)

    def default_at(self, model: nn.Module) -> Sequence[str]:
        blocks = transformer_blocks(model)
        if self.deep:
            return blocks
        lists = {block.rpartition(".")[0] for block in blocks}
        (path,) = lists if len(lists) == 1 else ("",)
        called = isinstance(model.get_submodule(path), nn.Sequential)
        require(
            bool(path) and called,
            f"VPT: deep=False needs one list of blocks that is called as a whole (nn.Sequential),"
            f" which {type(model).__name__} does not have",
        )
        return [path]

    def check_model(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Refuse blocks to which another token is not just one more of a set."""
        rotary = next((n for n, _ in model.named_modules() if _POSITIONS.search(n)), None)
        if rotary is not None:
            raise SiteError(
                f"VPT: {type(model).__name__} turns queries and keys by position ({rotary}), and"
                " prompts have none"
            )
        for site in sites:
            listed = isinstance(model.get_submodule(site.path), nn.Sequential)
            if listed and getattr(model, "grad_checkpointing", False):
                raise SiteError(
                    f"VPT: {type(model).__name__} checkpoints its blocks one by one and never calls"
                    f" {site.name}: use deep=True, or recompute='cheap' in place of"
                    " set_grad_checkpointing"
                )
            with _untouched(model):
                reason = _unfit(model.get_submodule(site.path), site.shape[0])
            if reason is not None:
                raise SiteError(f"VPT: {site.name} cannot be given prompts: {reason}")


class VPTAdapter(Adapter):
    """The prompts of one block, or of all."""

    def __init__(self, prompts: Tensor, where: str) -> None:
        super().__init__()
        self.prompts = nn.Parameter(prompts)
        self.where = where

    def enter(self, x: Tensor) -> Tensor:
        """x [n, t, d] -> [n, t + p, d]."""
        if x.ndim != 3 or x.shape[-1] != self.prompts.shape[1]:
            raise SiteError(
                f"{self.where} was given {list(x.shape)}: prompts need tokens"
                f" [n, t, {self.prompts.shape[1]}]"
            )
        return torch.cat([x, self.prompts.to(x.dtype).expand(len(x), -1, -1)], dim=1)

    def output(self, x: Tensor, y: Tensor, layer: FrozenLayer) -> Tensor:
        """y [n, t + p, d] -> [n, t, d]."""
        return y[:, : y.shape[1] - len(self.prompts)]


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Run the frozen model in eval mode, without sets and grad; its modes come back."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            if find_drawer(model) is None:
                yield
            else:
                with activate(model, None):
                    yield
    finally:
        for module in training:
            module.training = True


def _unfit(block: nn.Module, width: int) -> str | None:
    """Why a block does not treat its tokens [n, t, d] as a set of any size, or None."""
    parameter = next(block.parameters())
    if parameter.is_meta:
        return None
    x = torch.randn(2, 6, width, generator=Generator().manual_seed(0), device="cpu").to(parameter)
    other = x.clone()
    other[0, -1] = x[1, 0]
    try:
        y, turned, changed, fewer = (block(t) for t in (x, x.flip(1), other, x[:, 1:]))
    except _UNFIT as error:
        why = str(error).splitlines() or [type(error).__name__]
        return f"it fails on tokens [2, 6, {width}] alone: {why[0]}"
    shapes = [getattr(t, "shape", None) for t in (y, fewer)]
    if shapes != [x.shape, x[:, 1:].shape]:
        return f"it does not return its tokens [2, 6, {width}] one by one"
    if torch.equal(changed[0, :-1], y[0, :-1]):
        return "its tokens [n, t, d] do not meet, or only those before them"
    near = torch.finfo(y.dtype).eps ** 0.5 * float(y.abs().max())
    return None if torch.allclose(turned.flip(1), y, rtol=0, atol=near) else "their order matters"
