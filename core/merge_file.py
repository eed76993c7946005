"""Merge an adapter file into a checkpoint of its backbone: tensors only, no model is built."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .container import write_atomically
from .errors import StoreError
from .fingerprint import digest
from .layers import (
    ConvLayer,
    EmbeddingLayer,
    FrozenLayer,
    LinearLayer,
    TransposedLinearLayer,
)
from .recipe import Adapter
from .sites import Site
from .slots import Piece, apply_weights
from .store import AdapterFile, read_file

_LAYERS: dict[str, type[FrozenLayer]] = {
    "linear": LinearLayer,
    "transposed linear": TransposedLinearLayer,
    "embedding": EmbeddingLayer,
    "conv1d": ConvLayer,
    "conv2d": ConvLayer,
    "parameter": FrozenLayer,
}


def merge_file(adapter_path: str | Path, base_path: str | Path, out_path: str | Path) -> str:
    """Write `base_path` (safetensors, or a torch state dict) with the set's W' in place.

    The base must be the one that the set was made on, by digest. Returns a line that says what was
    done. Methods without a weight form are refused.
    """
    if Path(out_path).resolve() == Path(base_path).resolve():
        raise StoreError(f"--out {out_path} is the base itself: the base is never overwritten")
    file = read_file(adapter_path)
    base = _read_base(Path(base_path))
    _check(file, base, adapter_path, base_path)
    by_parameter: dict[str, list[Piece]] = {}
    for site in file.sites:
        key = f"{site.path}.{site.parameter}".lstrip(".")
        by_parameter.setdefault(key, []).append(_piece(file, site, base[key]))
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


def _piece(file: AdapterFile, site: Site, stored: Tensor) -> Piece:
    layer = _LAYERS[site.kind](nn.Module(), site.parameter, site.rows)
    adapter: Adapter = file.recipe.build(
        site, layer.matrix(stored), torch.Generator().manual_seed(0)
    )
    own = adapter.state_dict()
    for key, tensor in own.items():
        name = f"{site.name}/{key}"
        if name not in file.tensors or file.tensors[name].shape != tensor.shape:
            raise StoreError(f"the adapter file has no tensor {name} of shape {list(tensor.shape)}")
        own[key] = file.tensors[name]
    adapter.load_state_dict(own)
    return layer, adapter.eval()


def _check(
    file: AdapterFile, base: dict[str, Tensor], adapter_path: str | Path, base_path: str | Path
) -> None:
    method = type(file.recipe)
    if not file.sites:
        raise StoreError(
            f"{adapter_path} ({method.__name__}) has no sites: there is nothing to merge"
        )
    for site in file.sites:
        key = f"{site.path}.{site.parameter}".lstrip(".")
        if site.parameter is None or site.kind not in _LAYERS:
            raise StoreError(
                f"{method.__name__} acts on activations at {site.name}: it cannot be merged"
            )
        if key not in base:
            raise StoreError(
                f"{base_path} has no tensor {key}: it is not the backbone of {adapter_path}"
            )
        if digest(base[key]) != file.fingerprint.get(key):
            raise StoreError(
                f"{base_path}: {key} is not the weight that {adapter_path} was made on"
            )


def _read_base(path: Path) -> dict[str, Tensor]:
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise StoreError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise StoreError(
            f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise StoreError(f"{path} is not a state dict: names to tensors")
    return state
