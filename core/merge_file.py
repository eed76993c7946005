"""Merge an adapter file into a checkpoint of its backbone: tensors only, no model is built."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from .container import write_atomically
from .errors import AdaptError, StoreError
from .fingerprint import digest
from .layers import (
    ConvLayer,
    EmbeddingLayer,
    FrozenLayer,
    LinearLayer,
    TransposedLinearLayer,
)
from .recipe import ActsOnWeight, Piece
from .sets import AdapterSet
from .sites import Site
from .slots import apply_weights
from .store import AdapterFile, check_fit, read_file

_LAYERS: dict[str, type[FrozenLayer]] = {
    "linear": LinearLayer,
    "transposed linear": TransposedLinearLayer,
    "embedding": EmbeddingLayer,
    "conv1d": ConvLayer,
    "conv2d": ConvLayer,
    "parameter": FrozenLayer,
}

# What torch's reader of pickled tensors raises, depending on where the damage is.
_STUMBLES = (
    UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def merge_file(adapter_path: str | Path, base_path: str | Path, out_path: str | Path) -> str:
    """Write `base_path` (safetensors, or a torch state dict) with the set's W' in place.

    The base must be the one that the set was made on, by digest. Returns a line that says what was
    done. Methods without a weight form are refused.
    """
    for path in (base_path, adapter_path):
        if Path(out_path).resolve() == Path(path).resolve():
            raise StoreError(f"--out {out_path} is what is read: it is never overwritten")
    file = read_file(adapter_path)
    _check_method(file, adapter_path)
    base = _read_base(Path(base_path))
    _check_base(file, base, adapter_path, base_path)
    try:
        by_parameter = _pieces(file, base)
    except AdaptError as error:
        raise StoreError(f"{adapter_path}: {error}") from error
    with torch.no_grad():
        merged = {key: apply_weights(base[key], pieces) for key, pieces in by_parameter.items()}
    still = sum(int((base[key] == new).sum()) for key, new in merged.items())
    total = sum(new.numel() for new in merged.values())
    from safetensors.torch import save

    whole = {**base, **merged}
    plain = {key: t.detach().contiguous().clone() for key, t in whole.items()}
    write_atomically(Path(out_path), save(plain, {"format": "pt"}))
    return (
        f"{out_path}: {len(merged)} of {len(base)} tensors merged,"
        f" {100 * (total - still) / max(total, 1):.0f} % of their entries moved"
    )


def _key(site: Site) -> str:
    """The name of the site's parameter in a checkpoint."""
    return f"{site.path}.{site.parameter}".lstrip(".")


def _pieces(file: AdapterFile, base: Mapping[str, Tensor]) -> dict[str, list[Piece]]:
    """The file's adapters, filled, by the parameter that they change."""
    file.recipe.check(file.sites)
    built = [_piece(file, site, base[_key(site)]) for site in file.sites]
    bank = file.recipe.build_bank(file.sites, torch.Generator().manual_seed(0))
    made = AdapterSet(file.name, file.recipe, file.sites, [a for _, a in built], bank).eval()
    check_fit(file.tensors, made.state_dict())
    made.load_state_dict(file.tensors)
    by_parameter: dict[str, list[Piece]] = {}
    for site, piece in zip(file.sites, built, strict=True):
        by_parameter.setdefault(_key(site), []).append(piece)
    return by_parameter


def _piece(file: AdapterFile, site: Site, stored: Tensor) -> Piece:
    layer = _LAYERS[site.kind](nn.Module(), site.parameter, site.rows)
    try:
        matrix = layer.matrix(stored)
    except (RuntimeError, IndexError) as error:
        raise StoreError(f"{site.name} is no {site.kind}: {list(stored.shape)}") from error
    if tuple(matrix.shape) != site.shape:
        raise StoreError(f"{site.name} is {list(matrix.shape)}, expected {list(site.shape)}")
    adapter = file.recipe.build(site, matrix, torch.Generator().manual_seed(0))
    if not isinstance(adapter, ActsOnWeight):
        raise _acts_on_activations(file, site)
    return layer, adapter


def _acts_on_activations(file: AdapterFile, site: Site) -> StoreError:
    method = type(file.recipe).__name__
    return StoreError(f"{method} acts on activations at {site.name}: it cannot be merged")


def _check_method(file: AdapterFile, path: str | Path) -> None:
    if not file.sites:
        method = type(file.recipe).__name__
        raise StoreError(f"{path} ({method}) has no sites: there is nothing to merge")
    for site in file.sites:
        if site.parameter is None or site.kind not in _LAYERS:
            raise StoreError(f"{path}: {_acts_on_activations(file, site)}")


def _check_base(
    file: AdapterFile, base: Mapping[str, Tensor], adapter_path: str | Path, base_path: str | Path
) -> None:
    for key in map(_key, file.sites):
        if key not in base:
            raise StoreError(
                f"{base_path} has no tensor {key}: it is not the backbone of {adapter_path}"
            )
        if digest(base[key]) != file.fingerprint.get(key):
            raise StoreError(
                f"{base_path}: {key} is not the weight that {adapter_path} was made on"
            )


def _read_base(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise StoreError(f"there is no checkpoint {path}")
    if path.suffix != ".safetensors":
        return _read_torch(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} cannot be read as a checkpoint: {error}") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _STUMBLES as error:
        raise StoreError(
            f"{path} cannot be read as a checkpoint: it is damaged, or holds more than tensors"
            f" ({type(error).__name__}); only safetensors and plain state dicts are read"
        ) from error
    plain = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in state.items()
    )
    if not plain:
        raise StoreError(f"{path} is not a state dict: names to tensors")
    return dict(state)
