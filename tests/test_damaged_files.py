"""Damaged and foreign files: all are refused in one line, none is loaded or executed."""

from __future__ import annotations

import json
import os
import pickle
import random
import socket
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from polyadapt.core import LoRA, attach, load
from polyadapt.core.errors import StoreError
from polyadapt.tests.broken_files import backbone, good_content, header_end, line_of, raw, survivors


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """A good file: see `good_content`."""
    return good_content(tmp_path)


# ---- damage


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
