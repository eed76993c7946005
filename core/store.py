"""The adapter file: one self-sufficient safetensors file per set."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import container
from .banks import BANK
from .errors import AdaptError, SiteError, StoreError
from .fingerprint import fingerprint
from .recipe import Recipe
from .sets import AdapterSet, all_finite, build_set, check_tensors, install
from .sites import Site, Sites, refuse_repeated, select

FORMAT = 1
Held = TypeVar("Held")
_HEAD = ".head/"  # no site is called so: no path starts with a dot
_SITE_FIELDS = ("path", "parameter", "part", "rows", "kind", "shape", "slot")


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds, read and checked, not yet attached."""

    name: str
    recipe: Recipe
    sites: Sites
    tensors: dict[str, Tensor]
    fingerprint: dict[str, str]
    head: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    backbone_class: str = ""


def save(adapter_set: AdapterSet, path: str | Path, *, training_state: bool = False) -> None:
    """Write a set with its recipe, sites, the backbone's fingerprint, head and extras.

    What inference needs is stored; `training_state=True` keeps what only training needs (MoSA's
    experts). The file is written beside its place and renamed, so it is whole or not there.
    """
    recipe = adapter_set.recipe if training_state else adapter_set.recipe.deployed()
    tensors = adapter_set.state_dict() if training_state else adapter_set.deployed_state()
    save_form(adapter_set, path, (recipe, adapter_set.sites, tensors))


def save_form(
    adapter_set: AdapterSet, path: str | Path, form: tuple[Recipe, Sites, Mapping[str, Tensor]]
) -> None:
    """The same of what the set was converted to: by `live_ranks.as_lora`, or by `compact`."""
    recipe, sites, own = form
    tensors = dict(own) | {_HEAD + key: tensor for key, tensor in adapter_set.head.items()}
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise StoreError(f"set {adapter_set.name!r} is not saved: {name} holds NaN or infinity")
    backbone = adapter_set.backbone
    record = {
        "format": FORMAT,
        "name": adapter_set.name,
        "recipe": recipe.to_json(),
        "sites": [{f: getattr(site, f) for f in _SITE_FIELDS} for site in sites],
        "fingerprint": fingerprint(backbone, sites),
        "backbone_class": f"{type(backbone).__module__}.{type(backbone).__qualname__}",
        "versions": _versions(backbone),
        "extra": adapter_set.extra,
    }
    container.write(Path(path), record, tensors)


def read_file(path: str | Path) -> AdapterFile:
    """Read and check a file without a backbone. Raises `StoreError` naming what is wrong."""
    path = Path(path)
    record, tensors = container.read(path)
    if record.get("format") != FORMAT:
        raise StoreError(f"{path} has format {record.get('format')!r}; this version reads {FORMAT}")
    try:
        sites = Sites(_site(entry) for entry in _of(list, record["sites"]))
        refuse_repeated(sites)
        found = AdapterFile(
            name=_text(record["name"]),
            recipe=Recipe.from_json(record["recipe"]),
            sites=sites,
            tensors={k: t for k, t in tensors.items() if not k.startswith(_HEAD)},
            fingerprint=_of(dict, record["fingerprint"]),
            head={k.removeprefix(_HEAD): t for k, t in tensors.items() if k.startswith(_HEAD)},
            extra=_of(dict, record["extra"]),
            versions=_of(dict, record["versions"]),
            backbone_class=_text(record["backbone_class"]),
        )
    except StoreError:
        raise
    except AdaptError as error:
        raise StoreError(f"{path}: {error}") from error
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"{path} is damaged: its record lacks or misstates {error}") from error
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise StoreError(f"{path} is refused: {name!r} holds NaN or infinity")
    return found


def load(
    backbone: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    trainable: bool = False,
    strict: bool = True,
    convert: Callable[[AdapterFile], AdapterFile] | None = None,
) -> AdapterSet:
    """Attach the set of a file to a backbone and make it the default.

    The backbone must be the one the set was made on: same sites, shapes and frozen weights, by
    digest; `strict=False` lets other weight values (a cast, a fine-tuned copy) pass with a warning.
    `convert` maps what was read to what is attached: a backbone of another class may call the same
    weights otherwise. Nothing is changed when anything is refused.
    """
    file = read_file(path) if convert is None else convert(read_file(path))
    sites = _fitted(backbone, file, path)
    _check_fingerprint(backbone, file, sites, path, strict)
    own = torch.Generator().manual_seed(0)  # loading must not move the caller's random state
    try:
        made = build_set(backbone, file.recipe, sites, name or file.name, own)
        check_fit(file.tensors, made.state_dict())
        made.load_state_dict(file.tensors)
        made.head, made.extra = file.head, file.extra
        if not trainable:
            made.freeze()
        install(backbone, made)
    except AdaptError as error:
        raise StoreError(f"{path}: {error}") from error
    return made


def check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Names, shapes and numbers as `check_tensors`, and no dtype that copying would round."""
    check_tensors(found, wanted, "the file")
    for key, tensor in found.items():
        here, there = tensor.dtype, wanted[key].dtype
        floats = here.is_floating_point and there.is_floating_point
        if here != there and not (floats and torch.finfo(here).bits < torch.finfo(there).bits):
            raise StoreError(f"the file: {key!r} is {here}, expected {there}")


def inspect_file(path: str | Path) -> str:
    """What a file holds, as text."""
    file = read_file(path)
    count = sum(t.numel() for t in file.tensors.values())
    size = sum(t.numel() * t.element_size() for t in file.tensors.values())
    lines = [
        f"{path}: set {file.name!r}, {file.recipe}",
        f"backbone: {file.backbone_class}, {len(file.fingerprint)} frozen weights fingerprinted",
        f"{count:,} numbers, {size:,} bytes in {len(file.tensors)} tensors",
        *_bank_line(file),
        f"head: {_shapes(file.head)}",
        f"versions: {', '.join(f'{k} {v}' for k, v in sorted(file.versions.items()))}",
        *(f"{key}: {value}" for key, value in sorted(file.extra.items())),
    ]
    return "\n".join([*lines, str(file.sites)] if file.sites else lines)


def _bank_line(file: AdapterFile) -> list[str]:
    """Only of a method that shares tensors."""
    prefix = f"{BANK}/"
    own = {k.removeprefix(prefix): t for k, t in file.tensors.items() if k.startswith(prefix)}
    return [f"bank, shared by all sites: {_shapes(own)}"] if own else []


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{k} {list(t.shape)}" for k, t in tensors.items()) or "none"


def _site(entry: Mapping[str, Any]) -> Site:
    rows, parameter, part = entry["rows"], entry["parameter"], entry["part"]
    if rows is not None and not 0 <= rows[0] < rows[1]:
        raise ValueError(f"rows {rows!r}")
    return Site(
        path=_text(entry["path"]),
        parameter=None if parameter is None else _text(parameter),
        part=None if part is None else _text(part),
        rows=None if rows is None else (int(rows[0]), int(rows[1])),
        kind=_text(entry["kind"]),
        shape=tuple(int(n) for n in entry["shape"]),
        slot=_text(entry["slot"]),  # type: ignore[arg-type]  # `select` refuses other words
        why="as saved",
    )


def _of(kind: type[Held], value: object) -> Held:
    """Exactly what it should be: a list of pairs would pass for a dict, an empty text for both."""
    if not isinstance(value, kind):
        raise TypeError(f"{value!r}, which is not a {kind.__name__}")
    return value


def _text(value: object) -> str:
    """Text that may stand in a message of one line."""
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{value!r}, which is not plain text")
    return value


def _fitted(backbone: nn.Module, file: AdapterFile, path: str | Path) -> Sites:
    """The file's sites on this backbone, exactly."""
    try:
        return select(backbone, file.sites)
    except SiteError as error:
        raise StoreError(
            f"{path} is for another backbone ({file.backbone_class}): {error}"
        ) from error


def _check_fingerprint(
    backbone: nn.Module, file: AdapterFile, sites: Sites, path: str | Path, strict: bool
) -> None:
    here = fingerprint(backbone, sites)
    missing = sorted(set(here) ^ set(file.fingerprint))
    if missing:
        raise StoreError(
            f"{path} is for another backbone ({file.backbone_class}): {missing[0]!r} is not in both"
        )
    other = [name for name in here if here[name] != file.fingerprint[name]]
    if not other:
        return
    message = (
        f"{path} was made on other weights: {len(other)} of {len(here)} frozen weights differ,"
        f" first {other[0]}"
    )
    if strict:
        raise StoreError(f"{message}; load the backbone it was made on, or pass strict=False")
    warnings.warn(message, stacklevel=3)


def _versions(backbone: nn.Module) -> dict[str, str]:
    maker = type(backbone).__module__.split(".")[0]
    found = {"python": ".".join(map(str, sys.version_info[:3])), "torch": str(torch.__version__)}
    for package in ("polyadapt", maker):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
