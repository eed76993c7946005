"""Who reads a weight: the layer that is called with it, or an owner that uses the tensor directly.

nn.MultiheadAttention, nn.TransformerEncoderLayer (eval), whisper's decoder (tied logits) and
several timm models read `child.weight` without calling the child: a hook on the child would act on
nothing. We look for such a read in the source of the ancestors' methods, which covers classes we
have never seen; a needless hit only costs speed, a miss is what `probe=` finds.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING

from torch import nn

from .errors import SiteError
from .layers import module_at

if TYPE_CHECKING:
    from .sites import SlotKind

# A forward that only casts, such as that of whisper's Linear, spaces collapsed.
_CASTS = re.compile(
    r": return F\.linear\( ?(\w+), self\.weight(\.to\(\1\.dtype\))?,"
    r" (None if self\.bias is None else )?self\.bias(\.to\(\1\.dtype\))?,? ?\)$"
)
_NOT_FORWARD = re.compile(r"^(__init__|_?reset|_?init)")
_NOT_VALUES = r"(?!\.(?:dtype|device|shape|size|ndim|requires_grad)\b)"  # the same for W' and W


def reach(
    model: nn.Module, path: str, module: nn.Module, parameter: str, kind: str
) -> tuple[SlotKind, str, tuple[str, ...]]:
    """(slot, why, paths of the readers) for one parameter."""
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise SiteError(f"{path} has max_norm, which writes into the frozen table at each call")
    readers = list(_readers(model, path, parameter))
    if readers:
        owner = type(model.get_submodule(readers[0]))
        inside = path[len(readers[0]) :].lstrip(".")
        return "weight", f"{owner.__name__} reads {inside}.{parameter} itself", (path, *readers)
    if kind == "parameter":
        return "weight", f"{type(module).__name__} holds the parameter itself", (path,)
    if kind != "transposed linear" and not _is_plain(type(module)):  # type: ignore[arg-type]
        return "weight", f"{type(module).__name__} has a forward of its own", (path,)
    if vars(module).get("groups", 1) != 1:
        return "weight", "a grouped convolution has no low-rank path of its own", (path,)
    return "output", "the layer is called", ()


@cache
def _is_plain(layer: type[nn.Module]) -> bool:
    """Its call is the linear map of its weight, not of a scaled, standardised or shifted one."""
    plain = nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Embedding.forward
    if layer.forward in plain:
        return True
    try:
        return _CASTS.search(" ".join(inspect.getsource(layer.forward).split())) is not None
    except OSError:  # no source (built interactively)
        return False


def _readers(model: nn.Module, path: str, parameter: str) -> Iterator[str]:
    """Paths above `path`, nearest first, of modules that read the parameter themselves."""
    names = path.split(".") if path else []
    owners = list(accumulate(names, module_at, initial=model))
    inside = parameter
    for n in range(len(names) - 1, -1, -1):
        inside = f"{names[n]}.{inside}"
        if _reads(type(owners[n]), inside):  # type: ignore[arg-type]  # classes hash
            yield ".".join(names[:n])


def batch_axis_of(model: nn.Module, path: str, known: dict[str, int]) -> int:
    """Where samples lie in what the module at `path` gets: 1 under `batch_first=False`, else 0.

    `known`: what has been found for other paths of this model, to add to.
    """
    if path not in known:
        first = _batch_first(module_at(model, path))
        if first is None and path:
            known[path] = batch_axis_of(model, path.rpartition(".")[0], known)
        else:
            known[path] = 1 if first is False else 0
    return known[path]


def _batch_first(module: nn.Module) -> bool | None:
    """What a module, or a child of it, says about itself."""
    for holder in (module, *module._modules.values()):
        first = vars(holder).get("batch_first") if holder is not None else None
        if isinstance(first, bool):
            return first
    return None


@cache
def _reads(owner: type[nn.Module], attribute: str) -> bool:
    read, source = f"self.{attribute}", _source(owner)  # type: ignore[arg-type]  # classes hash
    if read not in source:  # nearly always, and far cheaper to find out than by the pattern
        return False
    return re.search(rf"\b{re.escape(read)}\b{_NOT_VALUES}", source) is not None


@cache
def _source(owner: type[nn.Module]) -> str:
    """Source of the methods that may run in a forward: not those that build or initialise."""
    sources = []
    for cls in owner.__mro__:
        if cls is nn.Module:
            break
        for name, method in vars(cls).items():
            if inspect.isfunction(method) and not _NOT_FORWARD.match(name):
                try:
                    sources.append(inspect.getsource(method))
                except OSError:  # no source (built interactively): treated as not reading
                    continue
    return "\n".join(sources)
