"""Would PEFT's wrapper act? It changes what a call returns; `layer.weight` stays the frozen one.

Our weight slot also serves layers whose weight *may* be read elsewhere (`readers`). Here it must be
known: timm's PatchEmbed reads `proj.weight` only when it is resized, whisper's decoder reads
`token_embedding.weight` in its forward, where PEFT's adapter does not act.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache

from torch import nn

from ..errors import StoreError
from ..readers import reach

_ENTRY = re.compile(r"forward|encode|decode|embed|generate|predict")
_MENTION = re.compile(r"\.(\w+)")
_NOT_VALUES = r"(?!\.(?:dtype|device|shape|size|ndim|requires_grad)\b)"


def refuse_unless_called(backbone: nn.Module, path: str, module: nn.Module, kind: str) -> None:
    """The layer's call is the linear map of its weight, and a forward reads the weight only so."""
    slot, why, _ = reach(module, "", module, "weight", kind)
    if slot == "weight":
        raise StoreError(
            f"{path}: {why}, and PEFT adds its branch to what the layer returns: that is no change"
            " of the weight"
        )
    _, why, readers = reach(backbone, path, module, "weight", kind)
    for owner in readers[1:]:
        inside = path[len(owner) :].lstrip(".")
        read = re.compile(rf"\bself\.{re.escape(inside)}\.weight\b{_NOT_VALUES}")
        methods = dict(_methods(type(backbone.get_submodule(owner))))  # type: ignore[arg-type]
        if any(read.search(methods[name]) for name in _called(backbone) & set(methods)):
            raise StoreError(
                f"{path}: {why} in its forward, where PEFT's adapter does not act and ours would"
            )


def _called(backbone: nn.Module) -> set[str]:
    """Names of methods that a use of the model may come to: those that one mentions, and so on."""
    classes = {type(module) for module in backbone.modules()}
    by_name: dict[str, list[str]] = {}
    for cls in classes:
        for name, source in _methods(cls):  # type: ignore[arg-type]
            by_name.setdefault(name, []).append(source)
    found, new = set[str](), {name for name in by_name if _ENTRY.match(name)}
    while new:
        found |= new
        mentioned = {
            m for name in new for source in by_name[name] for m in _MENTION.findall(source)
        }
        new = (mentioned & set(by_name)) - found
    return found


@cache
def _methods(cls: type[nn.Module]) -> tuple[tuple[str, str], ...]:
    """(name, source) of the methods of a module class, the most derived first."""
    return tuple(_sources(cls))


def _sources(cls: type[nn.Module]) -> Iterator[tuple[str, str]]:
    for base in reversed(cls.__mro__[: cls.__mro__.index(nn.Module)]):
        for name, method in vars(base).items():
            if inspect.isfunction(method):
                try:
                    yield name, inspect.getsource(method)
                except OSError:  # no source (built interactively): treated as not reading
                    continue
