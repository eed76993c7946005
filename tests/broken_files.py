"""What the tests of damaged files share: a good file, forged ones, and how they are refused."""

from __future__ import annotations

import hashlib
import json
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, nn

from polyadapt.core import LoRA, attach, load
from polyadapt.core.errors import StoreError
from polyadapt.core.store import read_file


def backbone() -> nn.Module:
    layers = {"größe": nn.Linear(6, 6), "act": nn.GELU(), "out": nn.Linear(6, 3)}
    model = nn.Sequential(OrderedDict(layers))  # a name that JSON may write in two ways
    generator = Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def good_content(tmp_path: Path) -> bytes:
    """The bytes of a good file: about a kilobyte of header, and 42 numbers."""
    made = attach(backbone(), LoRA(rank=2), at="{größe,out}")
    made.extra = {"label": "größer"}
    made.save(tmp_path / "good.safetensors")
    load(backbone(), tmp_path / "good.safetensors")
    return (tmp_path / "good.safetensors").read_bytes()


def line_of(path: Path) -> str:
    """The refusal of a file: one line that names it."""
    with pytest.raises(StoreError) as error:
        read_file(path)
    line = str(error.value)
    assert line.isprintable()
    assert str(path) in line
    return line


def overwrite(path: Path, content: bytes) -> None:
    """As `write_bytes`, which is slow: file systems flush a file that was emptied first."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def survivors(contents: Iterable[bytes], path: Path) -> tuple[int, list[str]]:
    """How many of the contents were tried, and what was loaded or not refused as it should be."""
    tried, wrong = 0, []
    path.touch()
    for n, content in enumerate(contents):
        overwrite(path, content)
        tried += 1
        try:
            read_file(path)
        except StoreError as error:
            line = str(error)
            if not line.isprintable() or str(path) not in line:
                wrong.append(f"{n}: says {line!r}")
        else:
            wrong.append(f"{n}: is loaded")
    return tried, wrong


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def raw(header: object, data: bytes) -> bytes:
    """Length, header as JSON (or as the bytes that it is), data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


RECORD = json.dumps({"format": 1})


def forged(tensors: dict[str, Any], data: bytes, record: str = RECORD) -> bytes:
    """As our own writer would have signed it."""
    digest = hashlib.sha256(json.dumps([record, tensors], sort_keys=True).encode() + data)
    return raw(
        {"__metadata__": {"polyadapt": record, "digest": digest.hexdigest()}, **tensors}, data
    )


def one(**changes: object) -> dict[str, Any]:
    """A tensor of two numbers, with changes."""
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def grammar(dice: random.Random, depth: int = 0) -> object:
    """Any JSON value, mostly of the words that a header has."""
    plain: list[object] = [0, 1, 8, -1, 2**63, 1.5, True, None, "F32", "BF16", "x", "", [0, 8], [2]]
    kind = dice.random()
    if depth > 3 or kind < 0.5:
        return dice.choice(plain)
    if kind < 0.6:
        return [grammar(dice, depth + 1) for _ in range(dice.randrange(4))]
    keys = ["dtype", "shape", "data_offsets", "x", "y", "__metadata__", "polyadapt", "digest"]
    return {dice.choice(keys): grammar(dice, depth + 1) for _ in range(dice.randrange(5))}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys."""
    keys: Iterable[Any] = ()
    if isinstance(value, dict):
        keys = value
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        yield value, key
        yield from places(value[key])
