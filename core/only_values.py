"""A configuration gives values: what jsonargparse would import and call inside of them is refused.

Where an argument is `Any`, `object` or a function, jsonargparse (4.48) takes {class_path: os.mkdir,
init_args: {path: x}} for an order to call os.mkdir. A key whose type is a class keeps its
class_path: there it is checked against that class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable as Function
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, get_args, get_origin

from jsonargparse import Namespace, _typehints

REFUSED = "is not allowed here: numbers, words, lists and keys with values are"

_hints: Any = _typehints
_Adapt = Function[..., Any]
_default: ContextVar[object] = ContextVar("_default", default=None)


@contextmanager
def only_values() -> Iterator[None]:
    """Meanwhile jsonargparse calls nothing that is named among free values, nor takes functions.

    Raises `ValueError`, which jsonargparse puts the key in front of.

    >>> from jsonargparse import ArgumentParser
    >>> parser = ArgumentParser(exit_on_error=False)
    >>> _ = parser.add_argument("--options", type=dict[str, Any])
    >>> with only_values():
    ...     parser.parse_args(["--options", "{a: [{class_path: os.getcwd}]}"])
    Traceback (most recent call last):
        ...
    argparse.ArgumentError: Parser key "options":
      class_path 'os.getcwd' is not allowed here: numbers, words, lists and keys with values are
    """
    action = _hints.ActionTypeHint
    adapt, check, within = _hints.adapt_typehints, action._check_type, _hints.adapt_classes_any
    _hints.adapt_typehints = _adapting(adapt)
    _hints.adapt_classes_any = _free
    action._check_type = _knowing_its_default(check)
    try:
        yield
    finally:
        _hints.adapt_typehints, _hints.adapt_classes_any = adapt, within
        action._check_type = check


def _free(value: Any, *_: Any) -> Any:
    """In the place of jsonargparse's own, which makes what the value names."""
    _refuse_classes(value)
    return value


def _refuse_classes(value: object) -> None:
    for path in _class_paths(value):
        raise ValueError(f"class_path {path!r} {REFUSED}")


def _class_paths(value: Any) -> Iterator[object]:
    """What a value names as a class, at any depth; YAML's aliases can make it hold itself."""
    left, seen = [value], set[int]()
    while left:
        found = left.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, Namespace):
            found = vars(found)
        if isinstance(found, Mapping):
            if "class_path" in found:
                yield found["class_path"]
            left += found.values()
        elif isinstance(found, list | tuple | set):
            left += found


def _adapting(adapt: _Adapt) -> _Adapt:
    def adapting(value: Any, hint: Any, *others: Any, **settings: Any) -> Any:
        if hint is object:  # every class is one
            hint = Any
        if Any in get_args(hint) and isinstance(value, dict):  # a key of its own, too
            _refuse_classes(value)
        if not (settings.get("serialize") or settings.get("instantiate_classes")) and (
            isinstance(value, str | dict | Namespace | _hints.NestedArg) and _is_function(hint)
        ):
            path = _path(value)
            if path is not None and path != _path(_default.get()):
                raise ValueError(f"the function {path!r} {REFUSED}")
        return adapt(value, hint, *others, **settings)

    return adapting


def _is_function(hint: Any) -> bool:
    origin = get_origin(hint) or hint
    return origin is Function or bool(_hints.is_instance_factory_protocol(hint))


def _path(value: object) -> object:
    """The import path of a function or class, as a configuration or a default writes it."""
    if isinstance(value, _hints.NestedArg):  # --key.class_path=... on the command line
        return value.val if value.key == "class_path" else None
    if isinstance(value, dict | Namespace):
        return value.get("class_path")
    if inspect.isroutine(value) or isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return value if isinstance(value, str) else None


def _knowing_its_default(check: _Adapt) -> _Adapt:
    """The author of a class may set a function, and only a configuration may not."""

    @functools.wraps(check)  # jsonargparse reads what it takes
    def checking(self: Any, *values: Any, **settings: Any) -> Any:
        token = _default.set(self.default)
        try:
            return check(self, *values, **settings)
        finally:
            _default.reset(token)

    return checking
