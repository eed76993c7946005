"""Frozen backbones as plain settings that can build them again, on this machine or another."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar, get_origin, get_type_hints

from torch import nn

from .building import whole
from .errors import AdaptError

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Backbone(ABC):
    """Settings that name one frozen backbone exactly; they travel in the adapter file as JSON.

    A domain derives one class, whose subclasses are the kinds that it knows. Settings with which
    a model has an empty parameter are refused.

    >>> class Lenses(Backbone):
    ...     pass
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Blurred(Lenses):
    ...     width: int = 8
    ...     def build(self):
    ...         return nn.Linear(self.width, self.width)
    >>> Lenses.from_json(Blurred(width=4).to_json())
    Blurred(width=4)
    """

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "build" in vars(cls):
            cls.build = _whole(cls.build)  # type: ignore[method-assign]

    @abstractmethod
    def build(self) -> nn.Module:
        """The frozen model, on the CPU, in eval mode."""

    @classmethod
    def kinds(cls) -> dict[str, type[Self]]:
        """The kinds by name, in the order of their definition."""
        return {kind.__name__: kind for kind in cls.__subclasses__()}

    def to_json(self) -> dict[str, Any]:
        """The kind of backbone and its settings as JSON values."""
        return {"backbone": type(self).__name__, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: object) -> Self:
        """The settings that `to_json` wrote; an unknown kind or setting is refused by name."""
        return one_of_kinds("backbone", cls.kinds(), data)


def _whole(build: Callable[[Any], Any]) -> Any:
    @functools.wraps(build)  # what is abstract stays so
    def build_whole(self: Any) -> Any:
        check_settings(type(self), vars(self))  # null in a configuration passes its reader
        return whole(functools.partial(build, self), self)

    return build_whole


def one_of_kinds(key: str, kinds: Mapping[str, type[_T]], data: object) -> _T:
    """The dataclass that JSON values name: its kind by `key`, and its settings beside it."""
    if not isinstance(data, Mapping) or data.get(key) not in kinds:
        raise AdaptError(f"{data!r} names no {key}; there are {', '.join(kinds)}")
    settings = {str(name): value for name, value in data.items() if name != key}
    kind = kinds[data[key]]
    check_settings(kind, settings)
    return kind(**settings)


def check_settings(kind: type[Any], settings: Mapping[str, Any]) -> None:
    """Refuse a setting that the dataclass lacks, needs, or has of another type, by name."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    needed = {name for name, f in fields.items() if _has_no_default(f)}
    if odd := sorted((settings.keys() - fields) | (needed - settings.keys())):
        raise AdaptError(f"{kind.__name__} has the settings {sorted(fields)}: see {odd[0]!r}")
    for name, hint in get_type_hints(kind).items():
        value, wanted = settings.get(name), dict if get_origin(hint) is dict else hint
        if not isinstance(wanted, type) or name not in settings:
            continue
        if not isinstance(value, wanted) and not (wanted is float and isinstance(value, int)):
            raise AdaptError(f"{kind.__name__}: {name} is a {wanted.__name__}, not {value!r}")


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING
