"""The bytes of an adapter file: safetensors with one JSON record and a digest over everything.

Reading trusts nothing: sizes are checked before anything is allocated, no pickle is read, and every
refusal is one line.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import StoreError

_LONGEST_HEADER = 64 << 20
_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}


def write(path: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write record and tensors beside `path`, then rename: whole or not at all."""
    from safetensors.torch import save

    plain = {name: t.detach().cpu().contiguous().clone() for name, t in sorted(tensors.items())}
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    unsigned = save(plain, {"polyadapt": text})
    header, data = _split(unsigned, str(path))
    signed = save(plain, {"polyadapt": text, "digest": _digest(text, header, data)})
    write_atomically(path, signed)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step; a failure leaves what was there."""
    if not path.parent.is_dir():
        raise StoreError(f"cannot write {path}: the folder {path.parent} does not exist")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise StoreError(f"cannot write {path}: {error.strerror}") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(record, tensors) of an adapter file; anything doubtful raises `StoreError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = _content(path)
    header, data = _split(content, str(path))
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("polyadapt"), str):
        raise StoreError(f"{path} is a safetensors file but not an adapter file of polyadapt")
    if metadata.get("digest") != _digest(metadata["polyadapt"], header, data):
        raise StoreError(f"{path} is damaged: its content does not fit its digest")
    record = _json(metadata["polyadapt"].encode(), str(path))
    try:
        return record, load(content)
    except SafetensorError as error:
        raise StoreError(f"{path} is damaged: {error}") from error


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise StoreError(f"there is no adapter file {path}") from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    if content[:2] in (b"\x80\x02", b"PK") or content[:1] == b"\x80":
        raise StoreError(
            f"{path} is a pickle or zip (a torch.save file): only safetensors are read"
        )
    return content


def _split(content: bytes, path: str) -> tuple[dict[str, Any], bytes]:
    """The checked header and the tensor bytes."""
    if len(content) < 8:
        raise StoreError(f"{path} is not an adapter file: {len(content)} bytes are too few")
    length = int.from_bytes(content[:8], "little")
    if length > min(len(content) - 8, _LONGEST_HEADER):
        raise StoreError(f"{path} is truncated or not a safetensors file: header of {length} bytes")
    header = _json(content[8 : 8 + length], path)
    data = content[8 + length :]
    end = 0
    tensors = {k: v for k, v in header.items() if k != "__metadata__"}
    try:
        for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
            end = _checked_end(name, entry, end, path)
    except (KeyError, TypeError, IndexError) as error:
        raise StoreError(
            f"{path} is damaged: its header is not that of a safetensors file"
        ) from error
    if end != len(data):
        raise StoreError(f"{path} is truncated or damaged: {len(data)} bytes of tensors, not {end}")
    return header, data


def _checked_end(name: str, entry: dict[str, Any], start: int, path: str) -> int:
    begin, end = entry["data_offsets"]
    size = _BYTES.get(entry["dtype"], 0)
    for dim in entry["shape"]:
        if type(dim) is not int or dim < 0:
            raise StoreError(f"{path} is damaged: tensor {name!r} has shape {entry['shape']}")
        size *= dim
    if begin != start or end - begin != size or entry["dtype"] not in _BYTES:
        raise StoreError(f"{path} is damaged: tensor {name!r} does not fit its place")
    return int(end)


def _json(text: bytes, path: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{path} is damaged or not a safetensors file: its header cannot be read"
        ) from error
    if not isinstance(found, dict):
        raise StoreError(f"{path} is damaged or not a safetensors file: its header is no object")
    return found


def _digest(record: str, header: Mapping[str, Any], data: bytes) -> str:
    """sha256 over the record, every tensor's name, dtype, shape and place, and all bytes."""
    tensors = {k: header[k] for k in sorted(header) if k != "__metadata__"}
    found = hashlib.sha256(json.dumps([record, tensors], sort_keys=True).encode())
    found.update(data)
    return found.hexdigest()
