"""Nulls in a configuration: refused by their key where a class takes none.

The parser lets null pass for any key, as if it had not been given.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import AdaptError


def refuse_nulls(settings: Mapping[str, Any], cls: type, key: str) -> None:
    """Raise `AdaptError` for a null among the settings of a class, or of what they choose.

    >>> from .adapters.lora import LoRA
    >>> refuse_nulls({"rank": 4, "alpha": None}, LoRA, "model.adapter")
    >>> refuse_nulls({"rank": None}, LoRA, "model.adapter")
    Traceback (most recent call last):
        ...
    polyadapt.core.errors.AdaptError: model.adapter.rank: null is not allowed: int
    """
    for name, value in settings.items():
        place, hint = f"{key}.{name}", _hint(cls, name)
        if value is None and not _takes_null(hint):
            raise AdaptError(f"{place}: null is not allowed: {_words(hint)}")
        if not isinstance(value, Mapping):
            continue
        if isinstance(value.get("class_path"), str):
            refuse_chosen(value, place)
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            refuse_nulls(value, hint, place)


def refuse_chosen(chosen: Mapping[str, Any], key: str) -> None:
    """The same for a class_path with its init_args."""
    module, _, name = chosen["class_path"].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    if inspect.isclass(cls):
        refuse_nulls(chosen.get("init_args") or {}, cls, key)


def _hint(cls: type, name: str) -> Any:
    """The type of a setting, of the class or of the parent that it is handed on to."""
    for owner in cls.__mro__:
        made = vars(owner).get("__init__")
        parameter = inspect.signature(made).parameters.get(name) if made else None
        if parameter is not None:
            return Any if parameter.default is None else _hints(owner).get(name, Any)
    return Any


def _hints(owner: type) -> dict[str, Any]:
    # What a dataclass inherits is resolved where it was written, which its __init__ cannot tell.
    fields = dataclasses.is_dataclass(owner)
    try:
        return get_type_hints(owner if fields else owner.__init__)  # type: ignore[misc]
    except NameError:  # a name that is imported for a type checker alone
        return {}


def _takes_null(hint: Any) -> bool:
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return any(choice in (Any, object, NoneType) for choice in choices)


def _words(hint: Any) -> str:
    """As a user would write it."""
    if get_origin(hint) in (Literal, Union, UnionType):
        return ", ".join(str(c) if isinstance(c, str) else _words(c) for c in get_args(hint))
    plain = isinstance(hint, type) and not get_args(hint)
    return hint.__name__ if plain else str(hint).replace("typing.", "")
