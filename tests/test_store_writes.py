"""Sets that are not saved, and writes that fail: the older file stays."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from polyadapt.core import AdaptError
from polyadapt.core.errors import StoreError
from polyadapt.tests.saved_sets import lora, net, saved


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A set named `pets`: see `saved`."""
    return saved(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_set_that_is_not_finite_is_not_saved_and_an_older_file_stays(
    file: Path, value: float
) -> None:
    before, made = file.read_bytes(), lora(net())
    made.adapters["blocks.1.qkv[q]"].get_parameter("B").data[0, 0] = value
    with pytest.raises(StoreError, match=r"'pets' is not saved: blocks.1.qkv\[q\]/B holds NaN"):
        made.save(file)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_head_that_is_not_finite_is_not_saved(file: Path) -> None:
    before, made = file.read_bytes(), lora(net())
    made.head = {"bias": torch.tensor([1.0, float("nan")])}
    with pytest.raises(StoreError, match="head/bias holds NaN"):
        made.save(file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("value", [float("nan"), Path("x"), {1, 2}, torch.ones(1)])
def test_an_extra_that_json_cannot_hold_is_not_saved(file: Path, value: object) -> None:
    before, made = file.read_bytes(), lora(net())
    made.extra = {"note": value}
    with pytest.raises(StoreError, match="its record is not JSON") as refusal:
        made.save(file)
    assert "\n" not in str(refusal.value)
    assert file.read_bytes() == before


def test_a_detached_set_is_not_saved(tmp_path: Path) -> None:
    made = lora(net())
    made.detach()
    with pytest.raises(AdaptError, match="'pets' is detached"):
        made.save(tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"the folder .*/none does not exist"):
        lora(net()).save(tmp_path / "none" / "a.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(StoreError, match=r"cannot write .*a.safetensors: Is a directory"):
        lora(net()).save(tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == ["a.safetensors"]


def _fails(code: int) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("owner", "name", "code"),
    [
        (os, "replace", errno.EIO),
        (os, "fsync", errno.ENOSPC),
        (os, "chmod", errno.EPERM),
        (tempfile, "mkstemp", errno.EACCES),  # a folder that may only be read
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    file: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, code: int
) -> None:
    before, made = file.read_bytes(), lora(net(), at="head")
    monkeypatch.setattr(owner, name, _fails(code))
    with pytest.raises(StoreError) as refusal:
        made.save(file)
    assert str(refusal.value) == f"cannot write {file}: {os.strerror(code)}"
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, made = file.read_bytes(), lora(net(), at="head")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.save(file)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]
