"""Frozen backbones as plain settings that can build them again, on this machine or another."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self, get_type_hints

from torch import nn

from .building import whole
from .errors import AdaptError


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
        kinds = cls.kinds()
        if not isinstance(data, Mapping) or data.get("backbone") not in kinds:
            raise AdaptError(f"{data!r} names no backbone; there are {', '.join(kinds)}")
        settings = {str(key): value for key, value in data.items() if key != "backbone"}
        kind = kinds[data["backbone"]]
        check_settings(kind, settings)
        return kind(**settings)


def _whole(build: Callable[[Any], Any]) -> Any:
    @functools.wraps(build)  # what is abstract stays so
    def build_whole(self: Any) -> Any:
        return whole(functools.partial(build, self), self)

    return build_whole


def check_settings(kind: type[Any], settings: Mapping[str, Any]) -> None:
    """Refuse a setting that the dataclass lacks, needs, or has of another type, by name."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    needed = {name for name, f in fields.items() if _has_no_default(f)}
    if odd := sorted((settings.keys() - fields) | (needed - settings.keys())):
        raise AdaptError(f"{kind.__name__} has the settings {sorted(fields)}: see {odd[0]!r}")
    for name, hint in get_type_hints(kind).items():
        value = settings.get(name)
        if isinstance(hint, type) and name in settings and not isinstance(value, hint):
            raise AdaptError(f"{kind.__name__}: {name} is a {hint.__name__}, not {value!r}")


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING
