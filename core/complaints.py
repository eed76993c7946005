"""What libraries find wrong with a configuration, in one line that names key and mend."""

from __future__ import annotations

import difflib
import importlib
import re
from argparse import ArgumentError
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

from .errors import AdaptError
from .only_values import REFUSED, only_values

Classes = Mapping[str, Collection[str]]


@contextmanager
def in_one_line(parser: ArgumentParser, classes: Classes) -> Iterator[None]:
    """Turn a complaint of the parser into an `AdaptError`; `classes` names those of each key.

    What it is given may name classes where a key is for one, and nowhere else.
    """
    try:
        with only_values():
            yield
    except AdaptError:
        raise
    except (ArgumentError, ValueError) as error:
        if isinstance(error, ValueError) and "Does not validate" not in str(error):
            raise  # not the parser's own
        keys = list(parser.get_defaults(skip_validation=True).keys())
        raise AdaptError(condensed(str(error), keys, classes)) from error
    except RecursionError as error:
        raise AdaptError("a value of the configuration holds itself") from error
    except AttributeError as error:
        if "append" not in str(error):
            raise  # not the parser's own: it takes a key `config` for its list of files
        raise AdaptError("unknown key 'config': a configuration names no other one") from error


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn what Lightning or a data worker says about a user's mistake into an `AdaptError`."""
    try:
        yield
    except AdaptError as error:
        if str(error).startswith("Caught "):  # a worker sends its traceback as the message
            raise AdaptError(str(error).splitlines()[-1].partition(": ")[2]) from None
        raise
    except MisconfigurationException as error:
        raise AdaptError(" ".join(str(error).split())) from error
    except RuntimeError as error:
        if "conditioned on metric" in str(error):  # EarlyStopping's words
            raise AdaptError(" ".join(str(error).split())) from error
        raise


def condensed(complaint: str, keys: Collection[str], classes: Classes) -> str:
    """The complaint in one line.

    >>> said = 'Parser key "model.lr":\\n  Expected a <class \\'float\\'>. Got value: x'
    >>> condensed(said, ["model.lr"], {})
    "model.lr: 'x' is not allowed: float"
    >>> condensed("Group 'model' does not accept option 'lrr'", ["model.lr"], {})
    "unknown key 'model.lrr'; nearest: model.lr"
    """
    key = ".init_args.".join(re.findall(r'Parser key "([^"]+)"', complaint))
    inside = re.findall(r"Problem with given class_path '([^']+)'", complaint)
    told: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (r"Expected a dot import path string: (.*)", lambda m: _unknown_class(key, m[1], classes)),
        (r"Import path (\S+) does not correspond", lambda m: _unknown_class(key, m[1], classes)),
        (r"Group '(.+)' does not accept option '(.+)'", lambda m: _unknown(f"{m[1]}.{m[2]}", keys)),
        (r"unrecognized arguments: (?:--)?([^\s=]+)", lambda m: _unknown(m[1], keys)),
        (r"arguments are required: (.*)", lambda m: _missing(key, inside, m[1])),
        (r"'NoneType' is not iterable", lambda m: "class_path: null is not allowed: a class"),
        (r"'NoneType' object has no attribute 'keys'", lambda m: _no_settings(key, inside)),
        (r"Unexpected config:", lambda m: "the configuration is empty, or not keys with values"),
    ]
    if found := re.search(f"^[ -]*(.*{REFUSED})", complaint, re.MULTILINE):
        return f"{key}: {found[1]}"
    for pattern, tell in told:
        if (found := re.search(pattern, complaint)) and "Literal" not in complaint:
            return tell(found)
    if found := re.search(r"Option '(.+)' is not accepted", complaint):
        return _unknown_setting(key, inside, found[1], keys)
    if found := re.search(r"^ +- (?!Expected |Problem )(.+)$", complaint, re.MULTILINE):
        return f"{key}: {found[1]}" if key else found[1]
    if found := re.search(r"(?:Got value|Given value): (.*)", complaint):
        return f"{key}: {found[1]!r} is not allowed: {_allowed(complaint)}"
    said = complaint.replace(f'Parser key "{key}":', "").replace('in "<unicode string>", ', "")
    return " ".join(said.split())


def _unknown(key: str, keys: Collection[str]) -> str:
    return f"unknown key {key!r}; {_nearest(key, keys)}"


def _unknown_setting(key: str, inside: list[str], name: str, keys: Collection[str]) -> str:
    if not inside:
        return _unknown(name, {k.partition(".")[0] for k in keys})
    cls = inside[-1].rpartition(".")[2]
    return f"{key}: {cls} has no setting {name!r}; {_nearest(name, _settings(inside[-1]))}"


def _unknown_class(key: str, name: str, classes: Classes) -> str:
    known = classes.get(key)
    if known is None:
        return f"{key}: {name!r} is not allowed, and no class of that name is known"
    return f"{key}: {name!r} is none of its classes; {_nearest(name.rpartition('.')[2], known)}"


def _missing(key: str, inside: list[str], names: str) -> str:
    if inside:
        return f"{key}: {inside[-1].rpartition('.')[2]} needs {names}"
    return f"the configuration lacks {names}: give --config FILE, or the keys themselves"


def _no_settings(key: str, inside: list[str]) -> str:
    cls = inside[-1].rpartition(".")[2] if inside else "a class"
    place = f"{key}: " if key else ""
    return f"{place}init_args of {cls}: null is not allowed: its settings, or leave it out"


def _nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f"nearest: {', '.join(near)}"
    if len(known) > 20:
        known = sorted({key.partition(".")[0] for key in known})
    return f"allowed: {', '.join(known)}"


def _settings(class_path: str) -> list[str]:
    """The arguments of a class, with those that it hands on to its parents."""
    module, _, name = class_path.rpartition(".")
    parser = ArgumentParser()
    return parser.add_class_arguments(getattr(importlib.import_module(module), name))


def _allowed(complaint: str) -> str:
    """The types that a value may have, as a user would write them."""
    found: list[str] = []
    complaint = complaint.rpartition("Problem with given class_path")[2]
    for expected in re.findall(r"Expected an? (.+?)(?:\. Got value.*)?$", complaint, re.MULTILINE):
        if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", expected):
            found += choices[1].replace("'", "").split(", ")
        elif kind := re.fullmatch(r"<class '(?:.*\.)?(\w+)'>", expected):
            found.append("null" if kind[1] == "NoneType" else kind[1])
        elif not expected.startswith("dot import path"):
            found.append(expected)
    return ", ".join(dict.fromkeys(found)) or "a value of another type"
