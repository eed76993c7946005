"""Adapter sets on either Whisper class: a set trained on one loads on the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ..core.errors import AdaptError, StoreError
from ..core.sets import AdapterSet
from ..core.sites import Sites
from ..core.store import AdapterFile, load
from .model import Speech
from .names import Layout, to_openai, to_transformers

Rename = Callable[[str], str]
_TO: dict[Layout, Rename] = {"openai": to_openai, "transformers": to_transformers}


def load_set(
    speech: Speech,
    path: str | Path,
    name: str | None = None,
    *,
    trainable: bool = False,
    strict: bool = True,
) -> AdapterSet:
    """Attach the set of a file, whichever Whisper class it was made on; see core's `load`.

    Sites, tensors and the fingerprint of the frozen weights are looked up under the names that
    `speech` has for them. The weights must be the same ones: a tiny.en is a tiny.en in both.
    """

    def convert(file: AdapterFile) -> AdapterFile:
        return in_layout(file, speech.layout, path)

    return load(speech.model, path, name, trainable=trainable, strict=strict, convert=convert)


def in_layout(file: AdapterFile, layout: Layout, path: str | Path = "the file") -> AdapterFile:
    """What a file holds, in the names of a layout; unchanged if they are that already."""
    if not file.sites or layout_of(file) == layout:
        return file
    try:
        return _renamed(file, _TO[layout])
    except AdaptError as error:
        raise StoreError(f"{path} is no set of a Whisper: {error}") from error


def layout_of(file: AdapterFile) -> Layout:
    """The layout whose names a file uses: transformers' model holds all in `model`."""
    theirs = any(site.path.split(".")[0] == "model" for site in file.sites)
    return "transformers" if theirs else "openai"


def _renamed(file: AdapterFile, rename: Rename) -> AdapterFile:
    sites = Sites(dataclasses.replace(site, path=rename(site.path)) for site in file.sites)
    names = {old: site.name for old, site in zip(file.sites, sites, strict=True)}
    new = {old.name: name for old, name in names.items()}

    def moved(key: str) -> str:
        site, _, rest = key.partition("/")
        return f"{new.get(site, site)}/{rest}"  # what no site owns is a bank's: it keeps its name

    return dataclasses.replace(
        file,
        sites=sites,
        recipe=file.recipe.renamed(names),
        tensors={moved(key): tensor for key, tensor in file.tensors.items()},
        fingerprint={rename(key): found for key, found in file.fingerprint.items()},
    )
