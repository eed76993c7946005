"""The bytes of an adapter file: safetensors with one JSON record and a digest over everything.

Reading trusts nothing: sizes are checked before anything is allocated, no pickle is read, and every
refusal is one line.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import StoreError

_LONGEST_HEADER = 64 << 20
_MOST_DIMS = 64  # torch's own limit
_WORDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BYTES = {word: dtype.itemsize for dtype, word in _WORDS.items()}


def write(path: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write record and tensors beside `path`, then rename: whole or not at all.

    safetensors' own writer lists the metadata in a random order, and copies all bytes twice: the
    same set shall give the same file, and saving shall cost little more than hashing.
    """
    try:
        text = json.dumps(record, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"cannot write {path}: its record is not JSON: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _WORDS:
            raise StoreError(f"cannot write {path}: {name!r} is {tensor.dtype}, which has no word")
    # Wide numbers first, so that every tensor lies at a multiple of its word.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    plain = [(name, t.detach().cpu().contiguous()) for name, t in ordered]
    header, data = _places(plain), [_raw(t) for _, t in plain]
    signed = {"digest": _digest(text, header, data), "polyadapt": text}
    # Neither blanks nor escapes, which could change without a trace.
    whole = {"__metadata__": signed, **header}
    head = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    write_atomically(path, len(head).to_bytes(8, "little"), head, *data)


def _places(tensors: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    """The header of a safetensors file with these tensors one behind another."""
    header, begin = {}, 0
    for name, tensor in tensors:
        end = begin + tensor.numel() * tensor.dtype.itemsize
        word, shape = _WORDS[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": word, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    return header


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def require_place(path: Path) -> None:
    """Refuse a path where no file can be: to be told before a long computation, not after it."""
    if not path.parent.is_dir():
        raise StoreError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise StoreError(f"cannot write {path}: Is a directory")


def write_atomically(path: Path, *content: bytes | memoryview) -> None:
    """Replace `path` by `content` in one step; a failure leaves what was there."""
    require_place(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(content)
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
    found = _digest(metadata["polyadapt"], header, [memoryview(content)[start:]])
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


def _digest(record: str, header: Mapping[str, Any], data: Iterable[memoryview]) -> str:
    """sha256 over the record, every tensor's name, dtype, shape and place, and all bytes."""
    tensors = {k: header[k] for k in sorted(header) if k != "__metadata__"}
    found = hashlib.sha256(json.dumps([record, tensors], sort_keys=True).encode())
    for part in data:
        found.update(part)
    return found.hexdigest()
