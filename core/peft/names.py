"""Which modules PEFT adapts: its rules for `target_modules` and for patterns of rank and alpha.

A folder's tensors must be those of exactly the modules that its config names: PEFT itself drops
what it does not find, without a word.
"""

from __future__ import annotations

import re
import reprlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from math import comb
from typing import TypeVar

from ..errors import StoreError
from .config import PeftConfig

_MOST_STEPS = 10**9
_Value = TypeVar("_Value")
_Paths = Collection[str]
_FIRST_NUMBER = r".*?\.[^.]*\.(?P<idx>\d+)\."


def targeted(config: PeftConfig, paths: _Paths) -> set[str]:
    """The modules among `paths` that PEFT puts an adapter on."""
    if not config.target or config.target == "all-linear":
        raise StoreError(
            f"target_modules is {config.target!r}; allowed: the names of the adapted modules, which"
            " PEFT writes when it saves"
        )
    wanted = _chosen("target_modules", config.target, paths)
    if config.layers:
        wanted &= _in_layers(config, wanted, paths)
    if config.exclude:
        wanted -= _chosen("exclude_modules", config.exclude, paths)
    return wanted - inside(config.saved_modules, wanted, paths)


def _chosen(key: str, names: Sequence[str] | str, paths: _Paths) -> set[str]:
    """A list names whole paths or their last components; a text is a regular expression."""
    if isinstance(names, str):
        fits = compiled(key, names, paths).fullmatch
        return {path for path in paths if path and fits(path)}
    exact, tails = set(names), tuple(f".{name}" for name in names)
    return {path for path in paths if path in exact or path.endswith(tails)}


def _in_layers(config: PeftConfig, wanted: set[str], paths: _Paths) -> set[str]:
    """Those named in full, and those whose first number (behind a pattern, if any) is listed."""
    if isinstance(config.target, str):
        raise StoreError("layers_to_transform is set beside a regular expression, as PEFT refuses")
    texts = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in config.layers_pattern]
    finders = [compiled("layers_pattern", text, paths) for text in texts or [_FIRST_NUMBER]]
    kept = wanted & set(config.target)
    for path in wanted:
        found = next(filter(None, (finder.match(path) for finder in finders)), None)
        if found and int(found["idx"]) in config.layers:
            kept.add(path)
    return kept


def inside(names: Sequence[str], wanted: _Paths, paths: _Paths) -> set[str]:
    """Those that are, or lie in, a module that PEFT saves as a whole: they get no adapter."""
    texts = [rf"(^|.*\.){name}($|\..*)" for name in names]
    whole = [compiled("modules_to_save", text, paths) for text in texts]
    return {path for path in wanted if any(module.match(path) for module in whole)}


def lookup(
    key: str, patterns: Mapping[str, _Value], paths: _Paths
) -> Callable[[str, _Value], _Value]:
    """(path, default) -> the value of the first pattern that fits the path's tail (`^`: all)."""
    fits = [(compiled(key, rf"(.*\.)?({p})$", paths), value) for p, value in patterns.items()]

    def find(path: str, default: _Value) -> _Value:
        return next((value for pattern, value in fits if pattern.match(path)), default)

    return find


def exactly(paths: Sequence[str], known: _Paths | None) -> list[str] | str:
    """`target_modules` that name these modules and no other one of `known` (None: not known).

    A list is what most readers expect, but PEFT also fits its names to the tails of paths.

    >>> exactly(["proj"], ["proj", "fc"]), exactly(["proj"], ["proj", "patch_embed.proj"])
    (['proj'], 'proj')
    """
    tails = tuple(f".{path}" for path in paths)
    own = set(paths)
    if known is not None and not any(p.endswith(tails) for p in known if p not in own):
        return list(paths)
    return "|".join(map(re.escape, paths))


def compiled(key: str, text: str, paths: _Paths) -> re.Pattern[str]:
    """The regular expression of a config, unless it is broken or could take very long."""
    longest = max(map(len, paths), default=0)
    if _steps(text, longest) * len(paths) > _MOST_STEPS:
        raise StoreError(
            f"{key}: {reprlib.repr(text)} could take too long to look up; allowed: few repeats,"
            " none of a group, or a list of names"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return re.compile(text)
        except (re.error, RecursionError, OverflowError, Warning) as error:
            raise StoreError(f"{key}: {reprlib.repr(text)} is no regular expression") from error


def _steps(text: str, length: int) -> float:
    """At most so many ways to fit a path: a hostile expression would run for ever."""
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "a", text, flags=re.DOTALL)
    repeats = len(re.findall(r"[*+{]", plain))
    if repeats > 9 or re.search(r"\)[*+{]|\s", plain):
        return float("inf")
    optional = len(re.findall(r"(?<![(*+?}])\?", plain))
    ways, bars = 1, [1]
    for letter in plain:
        if letter == "(":
            bars.append(1)
        elif letter == "|":
            bars[-1] += 1
        elif letter == ")" and len(bars) > 1:
            ways *= bars.pop()
    return float(min(comb(length + repeats, repeats) << optional, 10**18)) * min(
        ways * bars[0], 10**18
    )
