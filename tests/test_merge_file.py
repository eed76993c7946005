"""Merging an adapter file into a checkpoint of its backbone."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from polyadapt.core import (
    BitFit,
    Bottleneck,
    DoRA,
    FullFineTuning,
    HeadOnly,
    LayerNormTuning,
    LoRA,
    MoSA,
    Recipe,
    attach,
    sets_of,
)
from polyadapt.core import container as files
from polyadapt.core.errors import StoreError
from polyadapt.core.merge_file import merge_file
from polyadapt.tests.layer_zoo import good_files, save, zoo


@pytest.fixture
def good(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Adapter, base and result: see `good_files`."""
    return good_files(tmp_path)


def refused(adapter: Path, base: Path, out: Path) -> str:
    """One line, and nothing written."""
    folder = adapter.parent
    before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    with pytest.raises(StoreError) as error:
        merge_file(adapter, base, out)
    assert {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    line = str(error.value)
    assert line.isprintable()
    return line


MATRICES = [
    "linear",
    "qkv[q,v]",
    "c_attn[k]",
    "embed",
    "conv{1,2}",
    "attn.in_proj_weight[q,v]",
    "attn.out_proj",
]
VECTORS = ["linear.bias", "norm.**", "qkv.bias[k]"]


# ---- the same as in memory


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(
    ("recipe", "at", "dtype"),
    [
        (LoRA(rank=2), MATRICES, torch.float32),
        (LoRA(rank=2, alpha=5, scaling="rank_stabilised"), MATRICES, torch.float64),
        (LoRA(rank=4), MATRICES, torch.bfloat16),
        (DoRA(rank=2), MATRICES, torch.float32),
        (BitFit(), None, torch.float32),
        (LayerNormTuning(), None, torch.float16),
        (FullFineTuning(), None, torch.float32),
        (FullFineTuning(), [*MATRICES, *VECTORS], torch.bfloat16),
    ],
)
def test_a_merged_file_holds_the_bits_of_a_merge_in_memory(
    tmp_path: Path, recipe: Recipe, at: list[str] | None, dtype: torch.dtype, suffix: str
) -> None:
    model, base = zoo(dtype), tmp_path / f"base.{suffix}"
    untouched = zoo(dtype).state_dict()
    if suffix == "pt":
        torch.save(untouched, base)
    else:
        save_file(untouched, base)
    adapter = save(tmp_path / "set.safetensors", recipe, at, model)
    line = merge_file(adapter, base, tmp_path / "out.safetensors")
    sets_of(model)["default"].merge()
    merged, found = model.state_dict(), load_file(tmp_path / "out.safetensors")
    assert found.keys() == merged.keys()
    assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in merged.items())
    moved = [k for k in found if not torch.equal(found[k], untouched[k])]
    assert f"{len(moved)} of {len(untouched)} tensors merged" in line


def test_the_line_tells_how_much_moved(tmp_path: Path) -> None:
    """Rank 1 with one row of B: 6 of 24 entries move."""
    model = zoo()
    made = attach(model, LoRA(rank=1), at="linear")
    made.adapters["linear"].get_parameter("B").data[2] = 1.0
    made.save(tmp_path / "set.safetensors")
    save_file(zoo().state_dict(), tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    line = merge_file(tmp_path / "set.safetensors", tmp_path / "base.safetensors", out)
    assert (
        line == f"{out}: 1 of {len(zoo().state_dict())} tensors merged, 25 % of their entries moved"
    )


def test_the_base_may_hold_more_than_the_backbone(good: tuple[Path, Path, Path]) -> None:
    adapter, base, out = good
    save_file({**zoo().state_dict(), "another.weight": torch.ones(2)}, base)
    merge_file(adapter, base, out)
    assert torch.equal(load_file(out)["another.weight"], torch.ones(2))


def test_inputs_are_only_read(good: tuple[Path, Path, Path]) -> None:
    adapter, base, out = good
    before = adapter.read_bytes(), base.read_bytes()
    merge_file(adapter, base, out)
    merge_file(adapter, base, out)  # an older result is replaced
    assert (adapter.read_bytes(), base.read_bytes()) == before
    assert sorted(os.listdir(out.parent)) == [
        "base.safetensors",
        "out.safetensors",
        "set.safetensors",
    ]


def test_tensors_that_share_memory_are_written_each_for_itself(
    good: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    adapter, _, out = good
    state = zoo().state_dict()
    state["tied"] = state["linear.weight"]
    torch.save(state, tmp_path / "base.pt")
    merge_file(adapter, tmp_path / "base.pt", out)
    found = load_file(out)
    assert torch.equal(found["tied"], state["linear.weight"])
    assert not torch.equal(found["tied"], found["linear.weight"])


# ---- what is refused


@pytest.mark.parametrize(
    ("recipe", "at", "complaint"),
    [
        (Bottleneck(rank=2), "blocks.*", "Bottleneck acts on activations at blocks.0: it"),
        (Bottleneck(rank=2), "linear", "Bottleneck acts on activations at linear: it"),
        (MoSA(rank=2, experts=2), "blocks.*", "Bottleneck acts on activations at blocks.0: it"),
        (HeadOnly(), None, "(HeadOnly) has no sites: there is nothing to merge"),
    ],
)
def test_a_method_without_a_weight_form_is_refused_by_name(
    good: tuple[Path, Path, Path], recipe: Recipe, at: str | None, complaint: str
) -> None:
    _, base, out = good
    model = zoo()
    model.blocks[0].add_module("mlp", nn.Linear(4, 4))
    adapter = save(out.parent / "other.safetensors", recipe, at, model)
    save_file(model.state_dict(), base)
    line = refused(adapter, base, out)
    assert complaint in line
    assert str(adapter) in line


def test_another_base_is_refused(good: tuple[Path, Path, Path]) -> None:
    adapter, base, out = good
    state = zoo().state_dict()
    state["linear.weight"][0, 0] += 1e-3
    save_file(state, base)
    line = refused(adapter, base, out)
    assert line == f"{base}: linear.weight is not the weight that {adapter} was made on"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_base_that_was_cast_is_refused(good: tuple[Path, Path, Path], dtype: torch.dtype) -> None:
    adapter, base, out = good
    save_file(zoo(dtype).state_dict(), base)
    assert "is not the weight that" in refused(adapter, base, out)


def test_a_base_without_the_tensor_is_refused(good: tuple[Path, Path, Path]) -> None:
    adapter, base, out = good
    save_file({f"model.{k}": t for k, t in zoo().state_dict().items()}, base)
    line = refused(adapter, base, out)
    assert line == f"{base} has no tensor linear.weight: it is not the backbone of {adapter}"


def test_nothing_that_is_read_is_overwritten(good: tuple[Path, Path, Path]) -> None:
    adapter, base, _ = good
    link = base.parent / "link.safetensors"
    link.symlink_to(base)
    for out in (base, adapter, link, base.parent / "x" / ".." / base.name):
        assert "is what is read: it is never overwritten" in refused(adapter, base, out)


def test_a_result_that_cannot_be_written_is_named(good: tuple[Path, Path, Path]) -> None:
    adapter, base, out = good
    assert "does not exist" in refused(adapter, base, out.parent / "none" / "out.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda record, tensors: tensors.pop("linear/A"),
        lambda record, tensors: tensors.update(more=torch.ones(1)),
        lambda record, tensors: tensors.update({"linear/A": torch.ones(3, 6)}),
        lambda record, tensors: tensors.update({"linear/A": torch.ones(2, 6).double()}),
        lambda record, tensors: record["recipe"].update(rank=5),
        lambda record, tensors: record["sites"][0].update(shape=[4, 10**12]),
        lambda record, tensors: record["sites"][0].update(rows=[2, 6]),
        lambda record, tensors: record["sites"][0].update(kind="conv1d", shape=[1]),
        lambda record, tensors: record["sites"][0].update(kind="transposed linear"),
        lambda record, tensors: record["sites"][0].update(kind="no kind"),
        lambda record, tensors: record["sites"].append(record["sites"][0]),
    ],
)
def test_a_file_that_does_not_fit_itself_is_refused(
    good: tuple[Path, Path, Path], change: Callable[..., object]
) -> None:
    adapter, base, out = good
    record, tensors = files.read(adapter)
    change(record, tensors)
    files.write(adapter, record, tensors)
    assert str(adapter) in refused(adapter, base, out)


def test_a_damaged_adapter_file_is_refused(good: tuple[Path, Path, Path]) -> None:
    adapter, base, out = good
    adapter.write_bytes(adapter.read_bytes()[:-1])
    assert str(adapter) in refused(adapter, base, out)


class Harmful:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", ["base.pt", "base.safetensors", "base.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_base_is_not_run(
    good: tuple[Path, Path, Path], tmp_path: Path, name: str, zipped: bool
) -> None:
    adapter, _, out = good
    state = {**zoo().state_dict(), "extra": Harmful(tmp_path / "trace")}
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
    line = refused(adapter, tmp_path / name, out)
    assert f"{tmp_path / name} cannot be read as a checkpoint" in line
    assert not (tmp_path / "trace").exists()
    torch.load((tmp_path / name).rename(tmp_path / "base.bin"), weights_only=False)
    assert (tmp_path / "trace").exists()  # it would have worked


@pytest.mark.parametrize(
    "state",
    [[torch.ones(1)], {"a": 1}, {"state_dict": {"a": torch.ones(1)}}, {1: torch.ones(1)}, None],
)
def test_a_base_that_is_no_state_dict_is_refused(
    good: tuple[Path, Path, Path], tmp_path: Path, state: object
) -> None:
    adapter, _, out = good
    torch.save(state, tmp_path / "base.pt")
    assert "is not a state dict: names to tensors" in refused(adapter, tmp_path / "base.pt", out)


def test_a_base_that_is_no_file_is_refused(good: tuple[Path, Path, Path], tmp_path: Path) -> None:
    adapter, _, out = good
    for base in (tmp_path / "none.safetensors", tmp_path):
        assert refused(adapter, base, out) == f"there is no checkpoint {base}"


@pytest.mark.parametrize("suffix", ["safetensors", "zipped.pt", "legacy.pt"])
def test_a_damaged_base_is_refused_or_its_weights_are_those_wanted(
    good: tuple[Path, Path, Path], tmp_path: Path, suffix: str
) -> None:
    """A base has no digest of its own: only the adapted weights can be proved."""
    adapter, _, out = good
    state, base = zoo().state_dict(), tmp_path / f"damaged.{suffix}"
    if suffix == "safetensors":
        save_file(state, base)
    else:
        torch.save(state, base, _use_new_zipfile_serialization=suffix.startswith("zipped"))
    content, dice = base.read_bytes(), random.Random(0)
    said, merged = [], 0
    merge_file(adapter, tmp_path / "base.safetensors", out)
    wanted = load_file(out)["linear.weight"]
    for damaged in broken(content, dice):
        with base.open("r+b") as file:
            file.write(damaged)
            file.truncate()
        try:
            merge_file(adapter, base, out)
        except StoreError as error:
            said.append(str(error))
        else:
            merged += torch.equal(load_file(out)["linear.weight"], wanted)
    assert len(said) + merged == 240
    assert len(said) > 60
    assert [line for line in said if not line.isprintable()] == []


def broken(content: bytes, dice: random.Random) -> Iterator[bytes]:
    for _ in range(60):
        yield content[: dice.randrange(len(content))]
    for _ in range(180):
        damaged = bytearray(content)
        for _ in range(dice.choice([1, 1, 8])):
            damaged[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        yield bytes(damaged)
