"""Combine adapter files into a new one: the files alone, no backbone is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from . import container
from .combine_rule import Rule
from .combining import check_weights, combined
from .drawer import check_set_name
from .errors import StoreError
from .sets import AdapterSet
from .store import AdapterFile, read_file
from .unattached import unattached


@dataclass(frozen=True)
class _Source:
    """A file as it was checked, and as it lies on the disk."""

    path: Path
    weight: float
    file: AdapterFile
    record: dict[str, Any]
    tensors: dict[str, Tensor]


def combine_files(
    weights: Mapping[str | Path, float], out: str | Path, rule: Rule, name: str = "combined"
) -> str:
    """Write to `out` what `combine` makes of the sets in these files, which share a backbone.

    Returns what was done, with the relative error of the cut to a rank in total and per site.
    """
    check_weights([(str(path), weight) for path, weight in weights.items()])
    check_set_name(name, {})
    if Path(out).resolve() in {Path(path).resolve() for path in weights}:
        raise StoreError(f"--out {out} is what is read: it is never overwritten")
    used = [_source(Path(path), weight) for path, weight in weights.items() if weight]
    if rule.copies([source.weight for source in used]):
        container.write(Path(out), {**used[0].record, "name": name}, used[0].tensors)
        return f"{out}: {used[0].path} itself, as {name!r}"
    prints = _fingerprints(used)
    made = combined([(unattached(s.file, s.path), s.weight) for s in used], name, rule)
    _write(Path(out), made, used, prints)
    return f"{out}: {_report(made)}"


def _source(path: Path, weight: float) -> _Source:
    return _Source(path, weight, read_file(path), *container.read(path))


def _fingerprints(used: list[_Source]) -> dict[str, str]:
    """Those of all files, which must not contradict each other."""
    first, *others = used
    prints = dict(first.file.fingerprint)
    for other in others:
        for key, found in other.file.fingerprint.items():
            if prints.setdefault(key, found) != found:
                raise StoreError(
                    f"{other.path} was made on other weights than those before it: {key} differs"
                )
        classes = [s.file.backbone_class for s in (other, first)]
        if classes[0] != classes[1]:
            raise StoreError(f"{other.path} is for a {classes[0]}, {first.path} for a {classes[1]}")
    return prints


def _write(out: Path, made: AdapterSet, used: list[_Source], prints: dict[str, str]) -> None:
    entries = {
        site.name: entry
        for source in used
        for site, entry in zip(source.file.sites, source.record["sites"], strict=True)
    }
    first = used[0]
    head = {k: t for k, t in first.tensors.items() if made.head and k not in first.file.tensors}
    changed = {
        "name": made.name,
        "recipe": made.recipe.to_json(),
        "sites": [entries[site.name] for site in made.sites],
        "fingerprint": prints,
        "extra": made.extra,
    }
    container.write(out, {**first.record, **changed}, {**made.state_dict(), **head})


def _report(made: AdapterSet) -> str:
    told = made.extra["combined"]
    sums = " + ".join(f"{weight:g} {name}" for name, weight in told["weights"])
    ranks = [len(adapter.state_dict()["A"]) for adapter in made.adapters.values()]
    lines = [
        f"{sums} by {told['method']}, {len(ranks)} sites, relative error {told['error']:.3g}",
        *(
            f"{site}  rank {rank}  error {error:.3g}"
            for (site, error), rank in zip(told["errors"].items(), ranks, strict=True)
        ),
    ]
    return "\n".join(lines)
