"""One file per method; a new file here is found by its being here, no list to extend."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache

from ..errors import AdaptError
from ..recipe import Recipe


@cache
def recipes() -> dict[str, type[Recipe]]:
    """Every method's recipe class by name, from the files of this folder.

    >>> "LoRA" in recipes()
    True
    """
    found: dict[str, type[Recipe]] = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        found |= {name: thing for name, thing in vars(module).items() if _is_method(thing)}
    return found


def _is_method(thing: object) -> bool:
    return isinstance(thing, type) and issubclass(thing, Recipe) and thing is not Recipe


def recipe_class(name: object) -> type[Recipe]:
    """The recipe class of that name; a name we do not know is refused with the nearest ones."""
    known = recipes()
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name), known, n=3) or sorted(known)
        raise AdaptError(f"unknown method {name!r}; nearest: {', '.join(near)}")
    return known[name]
