"""The bytes of an adapter file: safetensors with one JSON record and a digest over everything.

Reading trusts nothing: sizes are checked before anything is allocated, no pickle is read, and every
refusal is one line.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from .errors import StoreError

_LONGEST_HEADER = 64 << 20
_MOST_DIMS = 64  # torch's own limit
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
    try:
        text = json.dumps(record, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"cannot write {path}: its record is not JSON: {error}") from error
    bare = save(plain)
    header, start = _header(io.BytesIO(bare), path)
    data = memoryview(bare)[start:]
    signed = {"digest": _digest(text, header, data), "polyadapt": text}
    # The library's own header would list the metadata in a random order: the same set shall give
    # the same bytes. Neither blanks nor escapes, which could change without a trace.
    whole = {"__metadata__": signed, **header}
    head = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    write_atomically(path, len(head).to_bytes(8, "little") + head + data)


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
    if path.exists() and not path.is_file():  # a pipe or a device might never end
        raise StoreError(f"cannot read {path}: it is not a file")
    try:
        with path.open("rb") as file:
            return _read(file, path)
    except FileNotFoundError as error:
        raise StoreError(f"there is no adapter file {path}") from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error


def _read(file: BinaryIO, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    header, start = _header(file, path)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("polyadapt"), str):
        raise StoreError(f"{path} is a safetensors file but not an adapter file of polyadapt")
    file.seek(0)
    content = file.read()
    found = _digest(metadata["polyadapt"], header, memoryview(content)[start:])
    if metadata.get("digest") != found:
        raise StoreError(f"{path} is damaged: its content does not fit its digest")
    record = _json(metadata["polyadapt"], path)
    try:
        return record, dict(sorted(load(content).items()))
    except SafetensorError as error:
        raise StoreError(f"{path} is damaged: {error}") from error


def _header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The checked header and where the tensors' bytes start."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    begin = file.read(9)
    if len(begin) < 9:
        raise StoreError(f"{path} is not an adapter file: {size} bytes are too few")
    if begin[8:] != b"{" and (begin[:1] == b"\x80" or begin[:2] == b"PK"):
        raise StoreError(
            f"{path} is a pickle or zip (a torch.save file): only safetensors are read"
        )
    length = int.from_bytes(begin[:8], "little")
    if length > min(size - 8, _LONGEST_HEADER):
        raise StoreError(f"{path} is truncated or not a safetensors file: header of {length} bytes")
    file.seek(8)
    header = _json(file.read(length), path)
    places = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = _checked_places(places, path)
    if end != size - 8 - length:
        raise StoreError(
            f"{path} is truncated or damaged: {size - 8 - length} bytes of tensors, not {end}"
        )
    return header, 8 + length


def _checked_places(places: Mapping[str, Any], path: Path) -> int:
    """The tensors lie one behind another, each as long as its shape says; where the last ends."""
    end = 0
    try:
        for name, entry in sorted(places.items(), key=lambda item: item[1]["data_offsets"]):
            end = _checked_end(name, entry, end, path)
    except StoreError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path} is damaged: its header is not that of a safetensors file"
        ) from error
    return end


def _checked_end(name: str, entry: dict[str, Any], start: int, path: Path) -> int:
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    plain = len(shape) <= _MOST_DIMS and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    if not plain:
        raise StoreError(f"{path} is damaged: tensor {name!r} has no possible shape")
    size = math.prod(shape, start=_BYTES.get(entry["dtype"], 0))
    if begin != start or end - begin != size or entry["dtype"] not in _BYTES:
        raise StoreError(f"{path} is damaged: tensor {name!r} does not fit its place")
    return int(end)


def _json(text: bytes | str, path: Path) -> dict[str, Any]:
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


def _digest(record: str, header: Mapping[str, Any], data: memoryview) -> str:
    """sha256 over the record, every tensor's name, dtype, shape and place, and all bytes."""
    tensors = {k: header[k] for k in sorted(header) if k != "__metadata__"}
    found = hashlib.sha256(json.dumps([record, tensors], sort_keys=True).encode())
    found.update(data)
    return found.hexdigest()
