"""What every domain shares: sites, slots, adapter sets, methods, the adapter file.

Names are resolved on first use, so that importing this package loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activation import activate as activate
    from .combining import combine as combine
    from .errors import AdaptError as AdaptError
    from .peft.reading import import_peft as import_peft
    from .peft.writing import export_peft as export_peft
    from .prefix_cache import PrefixCache as PrefixCache
    from .recipe import Adapter as Adapter
    from .recipe import Recipe as Recipe
    from .recomputation import recompute as recompute
    from .run_files import RunFiles as RunFiles
    from .sets import AdapterSet as AdapterSet
    from .sets import attach as attach
    from .sets import sets_of as sets_of
    from .sets import switch as switch
    from .sites import Site as Site
    from .sites import select as select
    from .stacking import stack as stack
    from .store import load as load
    from .training import AdaptedModule as AdaptedModule

_HOME = {
    "AdaptError": "errors",
    "Adapter": "recipe",
    "AdapterSet": "sets",
    "AdaptedModule": "training",
    "PrefixCache": "prefix_cache",
    "Recipe": "recipe",
    "RunFiles": "run_files",
    "Site": "sites",
    "activate": "activation",
    "attach": "sets",
    "combine": "combining",
    "export_peft": "peft.writing",
    "import_peft": "peft.reading",
    "load": "store",
    "recompute": "recomputation",
    "select": "sites",
    "sets_of": "sets",
    "stack": "stacking",
    "switch": "sets",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name[:1].isupper():  # a method: LoRA, DoRA, ... each defined by its file in `adapters`
        recipes = importlib.import_module(f"{__name__}.adapters").recipes()
        if name in recipes:
            return recipes[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    recipes = importlib.import_module(f"{__name__}.adapters").recipes()
    return sorted({*_HOME, *recipes})
