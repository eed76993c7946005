"""The pattern language: text -> what to look for. It knows no model.

=============================  ====================================================
`blocks.*.attn.qkv`            `*` is one path component, `**` any number of them (or none)
`blocks.{0,2}.mlp.{fc1,fc2}`   alternatives; each of them must find something
`blocks.*.attn.qkv[q,v]`       parts of a fused projection, one adapter each
`blocks.*.norm1.bias`          a parameter by name (`.weight` may be left out)
=============================  ====================================================

A pattern is compared with whole paths first; if none fits, with their tails, so that
`h.*.attn.c_attn` finds `transformer.h.0.attn.c_attn`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import product

from .errors import SiteError

_MOST = 10_000


@dataclass(frozen=True)
class Pattern:
    """One pattern without alternatives: a path with wildcards, and the wanted parts."""

    text: str
    path: str
    parts: tuple[str, ...]
    choices: tuple[str, ...]
    """The alternatives that led here, each of which must find something somewhere."""

    def matcher(self, tail: bool) -> re.Pattern[str]:
        """A regular expression for whole paths, or for tails of paths that start at a dot."""
        runs: list[list[str]] = [[]]  # of components between one `**` and the next
        for component in [*(["**"] if tail else []), *self.path.split(".")]:
            if component == "**":
                runs.append([])
            else:
                runs[-1].append(_component(component))
        first, *later = [r"\.".join(run) for run in runs]
        # The first place where a run fits is as good as any: atomic groups never try another, so
        # that no pattern, whoever wrote the file it stands in, takes long.
        body = "".join(rf"(?>(?:[^.]*\.)*?{run}\.)" for run in later[:-1] if run)
        if later:
            body += rf"(?:[^.]*\.)*{later[-1]}" if later[-1] else ".+"
        return re.compile(rf"{first}\.{body}" if first and body else first + body)


def _component(text: str) -> str:
    """One component as a regular expression; a `*` in it stands for any characters but the dot."""
    first, *later = map(re.escape, text.split("*"))
    if not later:
        return first
    return first + "".join(rf"(?>[^.]*?{piece})" for piece in later[:-1]) + rf"[^.]*{later[-1]}"


def parse(text: str) -> list[Pattern]:
    """Expand the alternatives of a pattern and read off its parts.

    >>> [(p.path, p.parts) for p in parse("h.{0,1}.attn[q,v]")]
    [('h.0.attn', ('q', 'v')), ('h.1.attn', ('q', 'v'))]
    """
    if not isinstance(text, str) or not text.strip():
        found = repr(text) if isinstance(text, str) else type(text).__name__
        raise SiteError(f"a pattern must be text such as 'blocks.*.attn.qkv[q,v]', not {found}")
    return [_read(text, expanded, choices) for expanded, choices in _expand(text.strip())]


def _expand(text: str) -> list[tuple[str, tuple[str, ...]]]:
    pieces = re.split(r"\{([^{}]*)\}", text)
    if any(c in "".join(pieces[0::2]) for c in "{}"):
        raise SiteError(f"pattern {text!r}: braces must be closed and not nested, as in {{a,b}}")
    fixed, braces = pieces[0::2], [piece.split(",") for piece in pieces[1::2]]
    if math.prod(map(len, braces)) > _MOST:  # they multiply: thirty pairs would never end
        raise SiteError(f"pattern {text!r}: its braces stand for more than {_MOST:,} paths")
    expanded = []
    for picks in product(*braces):
        picks = tuple(pick.strip() for pick in picks)
        if not all(picks):
            raise SiteError(f"pattern {text!r}: an empty alternative in braces")
        joined = fixed[0] + "".join(a + b for a, b in zip(picks, fixed[1:], strict=True))
        expanded.append((joined, tuple(f"{n}:{pick}" for n, pick in enumerate(picks))))
    return expanded


def _read(text: str, expanded: str, choices: tuple[str, ...]) -> Pattern:
    found = re.fullmatch(r"([\w*.\-]+)(?:\[([^\[\]]*)\])?", expanded)
    if found is None:
        raise SiteError(
            f"pattern {text!r} cannot be read at {expanded!r}: a dotted path with *, **, {{a,b}}"
            " and parts in brackets at the end, such as blocks.*.attn.qkv[q,v]"
        )
    path, inside = found.groups()
    parts = tuple(part.strip() for part in inside.split(",")) if inside is not None else ()
    if inside is not None and not all(parts):
        raise SiteError(f"pattern {text!r}: an empty part in brackets")
    if any("**" in component and component != "**" for component in path.split(".")):
        raise SiteError(f"pattern {text!r}: ** stands for whole components, between dots")
    return Pattern(text, path, parts, choices)
