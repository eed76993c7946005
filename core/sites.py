"""Resolve a pattern against a backbone before anything is attached, and print the result."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import nn
from torch.nn.parameter import is_lazy

from .drawer import own_modules
from .errors import SiteError
from .kinds import (
    is_called_layer,
    kind_of,
    parts_of,
    refuse_interleaved,
    stored_at,
    width_of,
)
from .patterns import Pattern, parse
from .readers import reach

SlotKind = Literal["weight", "output"]


@dataclass(frozen=True)
class Site:
    """One place in a backbone that an adapter can sit on."""

    path: str
    parameter: str | None
    part: str | None
    rows: tuple[int, int] | None
    kind: str
    shape: tuple[int, ...]
    slot: SlotKind
    why: str
    readers: tuple[str, ...] = ()
    """Paths of the modules whose call reads the weight (a WeightSlot works once per such call)."""

    @property
    def name(self) -> str:
        """`blocks.0.attn.qkv[q]`: how patterns, tables and adapter files call this site."""
        own_matrix = self.parameter == "weight" and self.kind != "parameter" and self.path
        plain = self.parameter is None or own_matrix
        path = self.path if plain else f"{self.path}.{self.parameter}".lstrip(".")
        return path if self.part is None else f"{path}[{self.part}]"


class Sites(tuple[Site, ...]):
    """The resolved sites of patterns, in the order they were asked for; printing shows a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("site", "shape", "kind", "slot", "why")]
        rows += [(s.name, "x".join(map(str, s.shape)), s.kind, s.slot, s.why) for s in self]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, (*widths, 0), strict=True)) for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)


def select(
    model: nn.Module, at: str | Iterable[str] | Sites, slot: SlotKind | None = None
) -> Sites:
    """The sites of `model` that a pattern, or several, name; see `patterns` for the language.

    `slot` overrides how the sites are reached (for layers that are called, both ways work). Sites
    of another model of the same shapes are looked up in this one.
    Raises `SiteError` for a pattern that finds nothing (with the nearest names), a weight that is
    named twice, a tied weight, and a part that the layer does not have.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> print(select(model, "{0,2}"))
    site  shape  kind    slot    why
    0     4x4    linear  output  the layer is called
    2     2x4    linear  output  the layer is called
    """
    names = _Names(model)
    if isinstance(at, Sites):
        found = [_same(names, site) for site in at]
    elif isinstance(at, Iterable):
        texts = [at] if isinstance(at, str) else at
        found = [site for text in texts for site in _resolve(names, text)]
    else:
        raise SiteError(
            f"sites are a pattern, several, or what select found, not {type(at).__name__}"
        )
    refuse_repeated(found)
    _refuse_tied(names, found)
    return Sites(found if slot is None else (_with_slot(site, slot) for site in found))


class _Names:
    """Every module and parameter path of a backbone, without polyadapt's own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        self.parameters: dict[str, tuple[str, str]] = {}
        self.holders: dict[int, list[str]] = {}  # by weight: every name that it is held under
        met: set[nn.Module] = set()
        for path, module in own_modules(model, repeated=True):
            again = module in met
            if not again:
                met.add(module)
                self.modules[path] = module
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                whole = f"{path}.{name}" if path else name
                if not again:
                    self.parameters[whole] = path, name
                if not is_lazy(parameter) and parameter.numel():
                    self.holders.setdefault(_identity(parameter), []).append(whole)

    def matching(self, pattern: Pattern) -> Sequence[tuple[str, str | None]]:
        """(module path, parameter or None) of all modules, else all parameters, that match."""
        for tail in (False, True):
            fits = pattern.matcher(tail).fullmatch
            if not pattern.path.endswith("**"):  # a last `**` means every parameter
                hits = [path for path in filter(fits, self.modules) if path]
                modules = [(path, None) for path in hits if _holds(self.modules[path])]
                if modules:
                    return modules
            parameters = [place for whole, place in self.parameters.items() if fits(whole)]
            if parameters:
                return parameters
        return []

    def nearest(self, path: str) -> str:
        known = [*self.modules, *self.parameters]
        shapes = {re.sub(r"(?<=\.)\d+(?=\.|$)", "*", n): None for n in known if n}
        near = difflib.get_close_matches(path, shapes, n=3, cutoff=0.3)
        tails = [s for s in shapes if s.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
        return ", ".join(dict.fromkeys([*near, *tails[:2]])) or "none"


def _holds(module: nn.Module) -> bool:
    """Wildcards pass over modules without a parameter (dropout, activations)."""
    return any(p is not None for m in module.modules() for p in m._parameters.values())


def _resolve(names: _Names, text: str) -> list[Site]:
    patterns = parse(text)
    found: dict[str, Site] = {}
    fruitful: set[str] = set()
    for pattern in patterns:
        hits = names.matching(pattern)
        if hits:
            fruitful.update(pattern.choices)
        for path, parameter in hits:
            for site in _sites_at(names, path, parameter, pattern):
                found.setdefault(site.name, site)
    for pattern in patterns:
        if not found or not fruitful.issuperset(pattern.choices):
            raise SiteError(
                f"pattern {text!r}: nothing in {type(names.model).__name__} is called"
                f" {pattern.path!r}; nearest: {names.nearest(pattern.path)}"
            )
    return list(found.values())


def _same(names: _Names, wanted: Site) -> Site:
    """The site of this backbone at the very place of another one, which it must equal."""
    weight = f"{wanted.path}.{wanted.parameter}".lstrip(".")
    if wanted.path not in names.modules or (wanted.parameter and weight not in names.parameters):
        raise SiteError(
            f"nothing in {type(names.model).__name__} is called {wanted.name!r};"
            f" nearest: {names.nearest(wanted.path)}"
        )
    parts = () if wanted.part is None else (wanted.part,)
    exactly = Pattern(wanted.name, wanted.path, parts, ())
    (here,) = _sites_at(names, wanted.path, wanted.parameter, exactly)
    if any(getattr(here, f) != getattr(wanted, f) for f in ("parameter", "kind", "shape", "rows")):
        raise SiteError(
            f"{wanted.name} was a {wanted.kind} {list(wanted.shape)},"
            f" in this {type(names.model).__name__} it is a {here.kind} {list(here.shape)}"
        )
    return _with_slot(here, wanted.slot)


def _sites_at(names: _Names, path: str, parameter: str | None, pattern: Pattern) -> list[Site]:
    module = names.modules[path]
    if parameter is None and is_called_layer(module):
        parameter = "weight"
    kind = kind_of(module, parameter)
    if parameter is None:
        if pattern.parts:
            raise SiteError(f"pattern {pattern.text!r}: {path} is a whole module and has no parts")
        return [_block_site(path, module)]
    refuse_interleaved(names.modules.get(path.rpartition(".")[0]), path, pattern)
    stored_at(module, path, parameter)
    slot, why, readers = reach(names.model, path, module, parameter, kind)
    return [
        Site(path, parameter, part, rows, kind, shape, slot, why, readers)
        for part, rows, shape in parts_of(module, path, parameter, kind, pattern)
    ]


def _block_site(path: str, module: nn.Module) -> Site:
    width = width_of(module)
    if width is None:
        raise SiteError(f"{path} ({type(module).__name__}) has no weight to tell its width")
    return Site(path, None, None, None, "block", (width,), "output", "a whole module")


def _with_slot(site: Site, slot: SlotKind) -> Site:
    if slot not in get_args(SlotKind):
        raise SiteError(f"slot={slot!r} is not allowed: {' or '.join(get_args(SlotKind))}")
    if slot == site.slot:
        return site
    if slot == "output" or site.kind == "block":
        raise SiteError(f"{site.name} can only take the {site.slot} slot: {site.why}")
    return replace(site, slot=slot, why="asked for", readers=(site.path,))


def refuse_repeated(sites: Sequence[Site]) -> None:
    """No weight, and no row of one, is named twice."""
    taken: dict[tuple[str, str | None], list[Site]] = {}
    for site in sites:
        others = taken.setdefault((site.path, site.parameter), [])
        for other in others:
            if _overlap(site.rows, other.rows):
                raise SiteError(f"{site.name} names the same weight as {other.name}: leave one out")
        others.append(site)


def _overlap(a: tuple[int, int] | None, b: tuple[int, int] | None) -> bool:
    return a is None or b is None or (a[0] < b[1] and b[0] < a[1])


def _refuse_tied(names: _Names, sites: Sequence[Site]) -> None:
    """A weight held under two names: adapting one would change both, or split them."""
    for site in sites:
        if site.parameter is None:
            continue
        stored = names.modules[site.path]._parameters[site.parameter]
        assert stored is not None, "a resolved site has its parameter"
        held_as = names.holders.get(_identity(stored), [])
        if len(held_as) > 1:
            raise SiteError(
                f"{site.name} is tied: the backbone holds one weight as {' and '.join(held_as)};"
                " adapt an untied weight, or untie it first"
            )


def _identity(parameter: nn.Parameter) -> int:
    """Where its numbers lie; meta tensors all have pointer 0."""
    return parameter.data_ptr() or id(parameter)
