"""recompute="cheap": keep what is dear to compute, compute the rest again in backward.

Selective activation checkpointing of a backbone's blocks. Kept are the input of each block, the
products of frozen weights (linear layers, convolutions) and the outputs of fused attention;
norms, activations and every product of an adapter's own factors are computed again. Gradients are
those of the plain run, bit for bit where torch's kernels repeat theirs (they do on a CPU).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .drawer import DRAWER
from .errors import AdaptError
from .kinds import is_called_layer

Mode = Literal["none", "cheap"]

_aten = torch.ops.aten
# Products, and which of their arguments are multiplied.
_PRODUCTS = {
    _aten.mm.default: slice(0, 2),
    _aten.bmm.default: slice(0, 2),
    _aten.addmm.default: slice(1, 3),
    _aten.baddbmm.default: slice(1, 3),
    _aten.convolution.default: slice(1, 2),
}
_CALL = (
    "_call_impl"  # what nn.Module's __call__ calls, hooks included; an instance's own comes first
)


def recompute(backbone: nn.Module, mode: Mode = "cheap") -> Recomputation:
    """Make the blocks of `backbone` keep less for backward, until `remove()` is called.

    Blocks are the modules of a list (timm's `blocks`, transformers' `layers` and `h`, whisper's
    `blocks`, open_clip's `resblocks`): all of one class, each with two layers or more and without a
    further such list. Sets may be attached, switched and detached before and after; recomputed
    forwards see the sets of their first one, and draw its random numbers. Without grad, and under
    torch.compile, which recomputes by rules of its own, blocks run as they are. One backward per
    forward: torch refuses a second. A batch norm in training mode would count a batch twice.

    Raises `AdaptError` for a backbone without such a list, or when it is on already; a call with a
    key-value cache is refused, as the second run would fill it again. Code that writes into the
    output of a layer is refused by torch in backward (modules with `inplace` are switched over).

    >>> from polyadapt.core import LoRA, attach
    >>> def block():
    ...     return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    >>> model = nn.Sequential(block(), block())
    >>> _ = attach(model, LoRA(rank=2), at="*.{0,2}")
    >>> with recompute(model) as on:
    ...     model(torch.ones(1, 4)).sum().backward()
    >>> on.blocks
    ('0', '1')
    """
    if mode not in get_args(Mode):
        raise AdaptError(f"recompute={mode!r} is not allowed: {' or '.join(get_args(Mode))}")
    found = dict(blocks(backbone)) if mode == "cheap" else {}
    if mode == "cheap" and not found:
        raise AdaptError(
            f"recompute: {type(backbone).__name__} has no list of blocks (modules of one class,"
            " with two layers or more each)"
        )
    taken = [path for path, block in found.items() if _CALL in block.__dict__]
    if taken:
        raise AdaptError(f"recompute: it is on already for {taken[0]}: remove() it first")
    # What is kept must not be written to, as an activation in place behind a layer would.
    inside = [m for block in found.values() for m in block.modules()]
    in_place = tuple(m for m in inside if getattr(m, "inplace", False) is True)
    for module in in_place:
        module.__dict__["inplace"] = False
    for block in found.values():
        block.__dict__[_CALL] = Region(block)
    return Recomputation(backbone, tuple(found), in_place)


@dataclass(frozen=True, eq=False)
class Recomputation:
    """The blocks of a backbone that keep less; a context manager, or `remove()` when done.

    `in_place`: their modules that worked in place before, and will again.
    """

    backbone: nn.Module
    blocks: tuple[str, ...]
    in_place: tuple[nn.Module, ...] = ()

    def remove(self) -> None:
        """Blocks keep everything again; forwards that ran before still get their backward."""
        for path in self.blocks:
            self.backbone.get_submodule(path).__dict__.pop(_CALL, None)
        for module in self.in_place:
            module.__dict__["inplace"] = True

    def __enter__(self) -> Recomputation:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def blocks(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, block) of every block of the backbone's innermost lists, in order.

    >>> import timm
    >>> [path for path, _ in blocks(timm.create_model("vit_tiny_patch16_224", depth=3))]
    ['blocks.0', 'blocks.1', 'blocks.2']
    """
    for path, module in backbone.named_modules():
        if DRAWER in path.split(".") or not _lists_blocks(module):
            continue
        inner = (m for child in module.children() for m in child.modules())
        if not any(_lists_blocks(m) for m in inner):
            for name, block in module.named_children():
                if name != DRAWER:
                    yield f"{path}.{name}".lstrip("."), block


def _lists_blocks(module: nn.Module) -> bool:
    if not isinstance(module, nn.Sequential | nn.ModuleList):
        return False
    children = [child for name, child in module.named_children() if name != DRAWER]
    alike = len({type(child) for child in children}) == 1
    return alike and all(_layers(child) > 1 for child in children)


def _layers(block: nn.Module) -> int:
    return sum(is_called_layer(module) for module in block.modules())


class Region:
    """Stands in for a block's `_call_impl`: the same call, checkpointed.

    A copy of the block copies it too, and refers to the copy.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain = id(self.block) in _running() or _within_larger()
        if plain or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return nn.Module._call_impl(self.block, *args, **kwargs)
        _refuse_cache(type(self.block).__name__, (*args, *kwargs.values()))
        # The second run is in backward, perhaps in another thread: what was given to the first by
        # a context (features to look at) is given to it again.
        given = copy_context()
        return checkpoint(
            partial(given.run, self._whole_call),
            *args,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, Kept(self.block)),
            respect_saved_tensors_hooks=True,
            **kwargs,
        )

    def _whole_call(self, *args: Any, **kwargs: Any) -> Any:
        """The call from its start: what `inject` puts around a block belongs to the second run."""
        _running().add(id(self.block))
        try:
            return self.block(*args, **kwargs)
        finally:
            _running().discard(id(self.block))


_threads = threading.local()


@contextmanager
def within_larger() -> Iterator[None]:
    """Within, in this thread: blocks run as they are.

    For both runs of a checkpointed call of more than a block: what its blocks kept in the first
    run would stay in memory until the second, which makes it anew.

    >>> with within_larger():
    ...     _within_larger()
    True
    """
    before = _within_larger()
    _threads.larger = True
    try:
        yield
    finally:
        _threads.larger = before


def _within_larger() -> bool:
    return getattr(_threads, "larger", False)


def _running() -> set[int]:
    """The blocks that this thread is in."""
    found: set[int] = _threads.__dict__.setdefault("running", set())
    return found


def _refuse_cache(block: str, values: tuple[Any, ...]) -> None:
    if any(hasattr(value, "get_seq_length") for value in values):  # transformers' caches
        raise AdaptError(
            f"recompute: {block} was called with a key-value cache, which the second run would fill"
            " again: pass use_cache=False"
        )


class Kept:
    """The policy of one call of a block: which results are kept.

    A product is the base's when it multiplies by a frozen weight of the block or by what was made
    of one at its size (a cast under autocast, W' = W + s B A); A x and B h are not. Tensors are
    told by their storage; a wrong guess costs memory or time, never a value.
    """

    def __init__(self, block: nn.Module) -> None:
        matrices = (p for p in block.parameters() if p.ndim > 1 and not p.requires_grad)
        self.frozen = {_storage(p) for p in matrices}
        self.made: set[int] = set()

    def __call__(
        self, context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        keep = _is_attention(op, args, kwargs)
        if op in _PRODUCTS:
            keep = any(self._weight(factor) for factor in args[_PRODUCTS[op]])
        # The sum of a product may start from a weight: W' = W + s B A.
        self._follow(args[:1] if op in _PRODUCTS else args, context.op_output)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def _weight(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        key = _storage(value)
        return key in self.frozen or key in self.made

    def _follow(self, sources: tuple[Any, ...], out: Any) -> None:
        """What is made of a weight, at its size, stands for it."""
        sizes = {source.numel() for source in sources if self._weight(source)}
        if not sizes and not self.made:
            return  # most operations, and there are many
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor) and made.numel() in sizes:
                self.made.add(_storage(made))
            elif isinstance(made, Tensor):
                self.made.discard(_storage(made))  # the memory of a freed cast is used again


def _is_attention(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A fused attention, unless it draws: if it were not run again, later draws would differ."""
    if not op.name().startswith("aten::_scaled_dot_product"):
        return False
    names = [argument.name for argument in op._schema.arguments]
    return not {**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
