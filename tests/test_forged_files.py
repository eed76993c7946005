"""Files with a valid digest that are not what they claim."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from polyadapt.core import load
from polyadapt.core.errors import StoreError
from polyadapt.core.store import read_file
from polyadapt.tests.broken_files import (
    RECORD,
    backbone,
    forged,
    good_content,
    grammar,
    header_end,
    line_of,
    one,
    overwrite,
    places,
    raw,
    survivors,
)


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """A good file: see `good_content`."""
    return good_content(tmp_path)


@pytest.fixture
def never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when tensors are made of a file that should have been refused before."""

    def build(content: bytes) -> None:
        raise AssertionError("tensors were built")

    monkeypatch.setattr(safetensors.torch, "load", build)


def test_what_the_forger_makes_would_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(forged(one(), bytes(8)))
    assert "lacks or misstates" in line_of(path)  # no sites and so on: it came as far as that


@pytest.mark.usefixtures("never_built")
@pytest.mark.parametrize(
    "tensors",
    [
        one(shape=[-2]),
        one(shape=[-1, -2]),
        one(shape=[True, 2]),
        one(shape=[2.0]),
        one(shape=["2"]),
        one(shape="2"),
        one(shape=2),
        one(shape=None),
        one(shape={}),
        one(shape=[[2]]),
        one(shape=[1 << 40]),
        one(shape=[1 << 62, 4]),  # the size is 8 modulo 2^64
        one(shape=[1 << 32, 1 << 32]),
        one(shape=[10**4000, 0], data_offsets=[0, 0]),
        one(shape=[1] * 100 + [2]),
        one(dtype="F64"),
        one(dtype="F8_E4M3"),
        one(dtype="C64"),
        one(dtype=""),
        one(dtype=None),
        one(dtype=["F32"]),
        one(dtype={}),
        one(data_offsets=[0, 4]),
        one(data_offsets=[8, 16]),
        one(data_offsets=[8, 0]),
        one(data_offsets=[-8, 0]),
        one(data_offsets=[0]),
        one(data_offsets=[0, 8, 8]),
        one(data_offsets=8),
        one(data_offsets=None),
        one(data_offsets="08"),
        one(data_offsets={"0": 0, "8": 8}),
        one(data_offsets=[None, 8]),
        one(data_offsets=[0, 1 << 70]),
        {"x": None},
        {"x": 5},
        {"x": "F32"},
        {"x": []},
        {"x": {}},
        {**one(), "y": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},  # shared bytes
        {**one(), "y": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {**one(data_offsets="08"), "y": one()["x"]},
    ],
)
def test_a_tensor_that_cannot_be_is_refused(tmp_path: Path, tensors: dict[str, Any]) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(forged(tensors, bytes(8)))
    assert "damaged" in line_of(path)


def test_ill_typed_but_equal_numbers_are_refused(tmp_path: Path) -> None:
    """Equal for Python, not for safetensors."""
    path = tmp_path / "a.safetensors"
    for offsets in ([0.0, 8.0], [False, 8]):
        path.write_bytes(forged(one(data_offsets=offsets), bytes(8)))
        assert "damaged" in line_of(path)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.usefixtures("never_built")
@pytest.mark.parametrize(
    "content",
    [
        (1 << 63).to_bytes(8, "little") + b"{}",
        b"\xff" * 8 + b"{}",
        (3).to_bytes(8, "little") + b"{}",
        bytes(8) + b"{}",
        raw(b"", bytes(8)),
        raw(b"{", b""),
        raw(b"[]", b""),
        raw(b"null", b""),
        raw(b'"x"', b""),
        raw(b"\xff\xfe{}", b""),
        raw(DEEP.encode(), b""),
        raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""),
        raw(b'{"x":{"dtype":"F32"},"x":{"dtype":"F32"}}', b""),
        raw(b'{"__metadata__":{},"__metadata__":{}}', b""),
        raw({"__metadata__": None}, b""),
        raw({"__metadata__": []}, b""),
        raw({"__metadata__": {"polyadapt": None}}, b""),
        raw({"__metadata__": {"polyadapt": {}}}, b""),
        raw({"__metadata__": {"polyadapt": RECORD}}, b""),
        raw({"__metadata__": {"polyadapt": RECORD, "digest": None}}, b""),
        raw({"__metadata__": {"polyadapt": RECORD, "digest": []}}, b""),
        forged({}, b"", record="{"),
        forged({}, b"", record="[]"),
        forged({}, b"", record=DEEP),
        forged({}, b"", record='{"format": 1, "format": 1}'),
        forged({}, b"", record='"\ud800"'),
        raw(b'{"x":{"dtype":"F32","shape":[1' + b"0" * 5000 + b'],"data_offsets":[0,0]}}', b""),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    line_of(path)


@pytest.mark.parametrize("name", ["../../x/A", "/etc/x/A", "x\n/A", "\ud800", "", "größe/A/../A"])
def test_names_are_only_names(tmp_path: Path, content: bytes, name: str) -> None:
    """A tensor's name is never a path: it belongs to a site or is refused."""
    good = tmp_path / "good.safetensors"
    end = header_end(content)
    header = json.loads(content[8:end])
    record = header.pop("__metadata__")["polyadapt"]
    header[name] = header.pop("größe/A")
    before = sorted(os.listdir(tmp_path.parent))
    good.write_bytes(forged(header, content[end:], record))
    with pytest.raises(StoreError) as refusal:
        load(backbone(), good)
    assert str(refusal.value).isprintable()
    assert sorted(os.listdir(tmp_path.parent)) == before


def test_headers_made_at_random_are_refused(tmp_path: Path) -> None:
    dice = random.Random(1)

    def made() -> Iterator[bytes]:
        for _ in range(1000):
            header = grammar(dice)
            yield raw(header, bytes(dice.choice([0, 4, 8])))
            tensors = {"x": grammar(dice), "y": grammar(dice)}
            yield forged(tensors, bytes(dice.choice([0, 4, 8])))

    assert survivors(made(), tmp_path / "a.safetensors") == (2000, [])


def test_records_made_at_random_are_refused(content: bytes, tmp_path: Path) -> None:
    """A good file with one value of its record replaced, signed again."""
    dice = random.Random(2)
    end = header_end(content)
    header = json.loads(content[8:end])
    text = header.pop("__metadata__")["polyadapt"]

    def changed() -> Iterator[bytes]:
        while True:
            record = json.loads(text)
            place, key = dice.choice(list(places(record)))
            value = grammar(dice)
            if place[key] == value or key in ("extra", "label", "versions"):
                continue
            place[key] = value
            yield forged(header, content[end:], json.dumps(record))

    path, wrong, loaded = tmp_path / "a.safetensors", [], 0
    path.touch()
    for damaged in islice(changed(), 600):
        overwrite(path, damaged)
        try:
            load(backbone(), path)
            loaded += 1  # another name, a scale: nothing that a reader could know to be wrong
        except StoreError as error:
            wrong += [] if str(error).isprintable() and str(path) in str(error) else [str(error)]
    assert wrong == []
    assert loaded < 200


def test_reading_leaves_no_file_open(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    before = len(os.listdir("/proc/self/fd"))
    for damaged in (content, content[:40], b"", content[:-1]):
        path.write_bytes(damaged)
        try:
            read_file(path)
        except StoreError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before
