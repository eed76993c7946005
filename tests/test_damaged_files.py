"""Files that are not what they claim: all are refused in one line, none is loaded or executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import socket
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
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


@pytest.fixture
def content(tmp_path: Path) -> bytes:
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
        except Exception as error:
            wrong.append(f"{n}: raises {error!r}")
        else:
            wrong.append(f"{n}: is loaded")
    return tried, wrong


# ---- damage


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def test_every_flipped_bit_is_found(content: bytes, tmp_path: Path) -> None:
    def flips() -> Iterator[bytes]:
        for bit in range(8 * len(content)):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            yield bytes(damaged)

    tried, wrong = survivors(flips(), tmp_path / "a.safetensors")
    assert wrong == []
    assert tried == 8 * len(content) > 10_000


def test_every_truncation_is_found(content: bytes, tmp_path: Path) -> None:
    shorter = (content[:n] for n in range(len(content)))
    tried, wrong = survivors(shorter, tmp_path / "a.safetensors")
    assert wrong == []
    assert tried == len(content)


def test_a_larger_file_truncated_at_every_97th_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    attach(nn.Sequential(nn.Linear(256, 256)), LoRA(rank=16), at="0").save(path)
    content = path.read_bytes()
    shorter = (content[:n] for n in range(0, len(content), 97))
    tried, wrong = survivors(shorter, tmp_path / "a.safetensors")
    assert wrong == []
    assert tried > 300


def test_random_damage_is_found(content: bytes, tmp_path: Path) -> None:
    dice = random.Random(0)

    def pieces() -> Iterator[bytes]:
        for _ in range(400):
            a, b = sorted(dice.sample(range(len(content) + 1), 2))
            noise = dice.randbytes(b - a)
            yield content[:a] + noise + content[b:]  # overwritten
            yield content[:a] + content[b:]  # cut out
            yield content[:b] + content[a:]  # twice
            yield content[:a] + noise + content[a:]  # put between
            yield content[:a] + bytes(b - a) + content[b:]  # zeroed, as by a crash
            yield content[:a] + content[a:b][::-1] + content[b:]  # turned round

    differ = (damaged for damaged in pieces() if damaged != content)
    tried, wrong = survivors(differ, tmp_path / "a.safetensors")
    assert wrong == []
    assert tried > 2000


def test_a_truncated_file_is_told_from_its_lengths(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content[:-8])
    assert "is truncated or damaged: 160 bytes of tensors, not 168" in line_of(path)  # 42 numbers
    path.write_bytes(content[:100])
    length = int.from_bytes(content[:8], "little")
    assert line_of(path).endswith(
        f"is truncated or not a safetensors file: header of {length} bytes"
    )


def test_something_behind_the_end_is_found(content: bytes, tmp_path: Path) -> None:
    longer = (content + tail for tail in (b"\0", b" ", b"\0" * 4096, content))
    assert survivors(longer, tmp_path / "a.safetensors") == (4, [])


def test_tensors_that_change_places_are_found(content: bytes, tmp_path: Path) -> None:
    """A and B have as many bytes: only the digest can tell."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    end = header_end(content)
    header = json.loads(content[8:end])
    (a, b), (c, d) = header["größe/A"]["data_offsets"], header["größe/B"]["data_offsets"]
    data = bytearray(content[end:])
    data[a:b], data[c:d] = data[c:d], data[a:b]
    path.write_bytes(content[:end] + data)
    assert "its content does not fit its digest" in line_of(path)
    names, text = ('"größe/A"'.encode(), '"größe/B"'.encode()), content[8:end]
    swapped = text.replace(names[0], b"?").replace(names[1], names[0]).replace(b"?", names[1])
    path.write_bytes(content[:8] + swapped + content[end:])
    assert "its content does not fit its digest" in line_of(path)


def test_a_refused_file_leaves_the_backbone_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = backbone()
    for n in range(0, len(content), 211):
        path.write_bytes(content[:n] + bytes([content[n] ^ 64]) + content[n + 1 :])
        with pytest.raises(StoreError):
            load(model, path)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert [name for name, _ in model.named_children()] == ["größe", "act", "out"]


# ---- other files


class Harmful:
    """Unpickling it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    path, trace = tmp_path / "a.safetensors", tmp_path / "trace"
    harmful = pickle.dumps(Harmful(trace), protocol)
    path.write_bytes(harmful)
    line = line_of(path)
    assert not trace.exists()
    assert protocol < 2 or "is a pickle or zip (a torch.save file): only safetensors" in line
    pickle.loads(harmful)
    assert trace.exists()  # it would have worked


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_save_file_is_refused_by_name(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.safetensors"
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
    assert "is a pickle or zip (a torch.save file): only safetensors are read" in line_of(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.touch()
    assert line_of(path) == f"{path} is not an adapter file: 0 bytes are too few"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert line_of(path) == f"there is no adapter file {path}"
    assert line_of(path / "b") == f"there is no adapter file {path / 'b'}"


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert "Not a directory" in line_of(tmp_path / "a" / "b.safetensors")


def test_a_folder_a_pipe_and_a_socket_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    for name in ("folder", "pipe", "socket"):
        assert line_of(tmp_path / name) == f"cannot read {tmp_path / name}: it is not a file"
    listening.close()


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    line_of(tmp_path / "a")


@pytest.mark.parametrize(
    "foreign",
    [
        b"\n",
        b"{}",
        b"not a file of ours at all, but longer than a header's length",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"GGUF\x03\0\0\0" + bytes(100),
        bytes(4096),
        b"\xff" * 4096,
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, foreign: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(foreign)
    line_of(path)


def test_a_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.safetensors", "w") as archive:
        archive.writestr("x", "y")
    assert "is a pickle or zip" in line_of(tmp_path / "a.safetensors")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"polyadapt": "{}"}])
def test_a_safetensors_file_of_somebody_else_is_refused(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.ones(3)}, path, metadata)
    line = line_of(path)
    if metadata == {"polyadapt": "{}"}:
        assert line == f"{path} is damaged: its content does not fit its digest"
    else:
        assert line == f"{path} is a safetensors file but not an adapter file of polyadapt"


def test_a_large_foreign_file_is_refused_by_its_header_alone(tmp_path: Path) -> None:
    path, size = tmp_path / "model.safetensors", 1 << 30
    with path.open("wb") as file:  # a hole: takes no place on the disk
        file.write(raw({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, b""))
        file.truncate(file.tell() + size)
    tracemalloc.start()
    assert "not an adapter file of polyadapt" in line_of(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


# ---- forged headers


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
