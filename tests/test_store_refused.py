"""Files for another backbone, or with something wrong in them: nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import Bottleneck, attach, load, sets_of
from polyadapt.core.store import read_file
from polyadapt.tests.saved_sets import INPUT, Net, edit, lora, net, refused, saved, wake


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A set named `pets`: see `saved`."""
    return saved(tmp_path)


# ---- another backbone


def wider() -> nn.Module:
    return net(width=16)


def shallower() -> nn.Module:
    return net(depth=1)


def changed() -> nn.Module:
    model = net()
    model.get_parameter("blocks.1.qkv.weight").data[0, 0] += 1e-4
    return model


class Other(Net):
    """Linear maps of the same shapes, stored the other way round."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.qkv = Conv1D()


class Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nf = 24
        self.weight = nn.Parameter(torch.zeros(8, 24))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("backbone", "complaint"),
    [
        (wider, r"blocks.0.qkv[q] was a linear [8, 8], in this Net it is a linear [16, 16]"),
        (shallower, "nothing in Net is called 'blocks.1.qkv[q]'"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), "nothing in Sequential is called"),
        (Other, "in this Other it is a transposed linear"),
    ],
)
def test_a_backbone_of_another_shape_is_refused(
    file: Path, backbone: Callable[[], nn.Module], complaint: str, strict: bool
) -> None:
    line = refused(backbone(), file, strict=strict)
    assert complaint in line
    assert "is for another backbone" in line


def test_a_deeper_backbone_is_not_refused_where_its_weights_are_the_same(file: Path) -> None:
    assert len(load(net(depth=3), file).sites) == 4


def test_a_backbone_of_other_weights_is_refused(file: Path) -> None:
    line = refused(changed(), file)
    assert "made on other weights: 1 of 2 frozen weights differ, first blocks.1.qkv.weight" in line
    assert line.endswith("load the backbone it was made on, or pass strict=False")


def test_a_block_with_one_more_parameter_is_refused(tmp_path: Path) -> None:
    model = net()
    wake(attach(model, Bottleneck(rank=2), at="blocks.*")).save(tmp_path / "a.safetensors")
    other = net()
    other.blocks[1].register_parameter("gain", nn.Parameter(torch.ones(8)))
    line = refused(other, tmp_path / "a.safetensors", strict=False)
    assert "'blocks.1.gain' is not in both" in line


def test_a_name_that_is_taken_is_refused(file: Path) -> None:
    model = net()
    load(model, file)
    assert "a set called 'pets' is attached already" in refused(model, file)
    assert "letters, digits" in refused(model, file, name="../x")


def test_loading_beside_a_merged_set_is_refused(file: Path) -> None:
    model = net()
    load(model, file).merge()
    assert "a set is merged into the weights" in refused(model, file, name="cats")


def test_a_refusal_leaves_the_sets_that_are_there(file: Path, tmp_path: Path) -> None:
    model = changed()
    lora(model, at="head", name="first")
    before = model(INPUT)
    refused(model, file)
    assert list(sets_of(model)) == ["first"]
    assert torch.equal(model(INPUT), before)


# ---- well-made files with something wrong in them


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["blocks.0.qkv[v]/B"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.0.qkv[v]/C"] = torch.ones(1)


def swap(tensors: dict[str, Tensor]) -> None:
    a, b = "blocks.0.qkv[v]/A", "blocks.0.qkv[v]/B"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.0.qkv[v]/A"] = torch.ones(3, 8)


def spoil(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.0.qkv[v]/A"][0, 0] = float("nan")


def spoil_head(tensors: dict[str, Tensor]) -> None:
    tensors[".head/weight"][0, 0] = float("inf")


def cast(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.0.qkv[v]/A"] = tensors["blocks.0.qkv[v]/A"].to(dtype)

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (drop, "tensor 'blocks.0.qkv[v]/B' is missing"),
        (add, "tensor 'blocks.0.qkv[v]/C' does not belong to it"),
        (swap, "'blocks.0.qkv[v]/A' is [8, 2], expected [2, 8]"),
        (reshape, "'blocks.0.qkv[v]/A' is [3, 8], expected [2, 8]"),
        (spoil, "'blocks.0.qkv[v]/A' holds NaN or infinity"),
        (spoil_head, "'.head/weight' holds NaN or infinity"),
        (cast(torch.float64), "'blocks.0.qkv[v]/A' is torch.float64, expected torch.float32"),
        (cast(torch.int32), "'blocks.0.qkv[v]/A' is torch.int32, expected torch.float32"),
        (cast(torch.bool), "'blocks.0.qkv[v]/A' is torch.bool, expected torch.float32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    file: Path, change: Callable[[dict[str, Tensor]], None], complaint: str
) -> None:
    assert complaint in refused(net(), edit(file, tensors=change))


def test_tensors_of_fewer_bits_are_widened_exactly(file: Path) -> None:
    stored = read_file(file).tensors["blocks.0.qkv[v]/A"].bfloat16()
    back = load(net(), edit(file, tensors=cast(torch.bfloat16)))
    widened = back.adapters["blocks.0.qkv[v]"].get_parameter("A")
    assert widened.dtype == torch.float32
    assert torch.equal(widened, stored.float())


def setting(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        record["recipe"][key] = value

    return change


def entry(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        record[key] = value

    return change


def site(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        record["sites"][0][key] = value

    return change


def repeat(record: dict[str, Any]) -> None:
    record["sites"].append(record["sites"][0])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (entry("format", 2), "has format 2; this version reads 1"),
        (entry("format", None), "has format None; this version reads 1"),
        (entry("name", "a\nb"), "lacks or misstates 'a\\nb', which is not plain text"),
        (entry("name", "../x"), "a set's name has letters, digits, _ and - only, got '../x'"),
        (entry("name", 3), "lacks or misstates 3, which is not plain text"),
        (entry("sites", None), "lacks or misstates"),
        (entry("sites", [3]), "lacks or misstates"),
        (entry("recipe", 3), "lacks or misstates"),
        (entry("recipe", {}), "unknown method None"),
        (entry("fingerprint", {}), "'blocks.0.qkv.weight' is not in both"),
        (entry("fingerprint", 3), "lacks or misstates"),
        (entry("fingerprint", {"x\ny": ""}), "is not in both"),
        (entry("extra", 3), "lacks or misstates"),
        (entry("extra", [["size", 8]]), "lacks or misstates [['size', 8]], which is not a dict"),
        (entry("versions", ""), "lacks or misstates '', which is not a dict"),
        (entry("sites", {}), "lacks or misstates {}, which is not a list"),
        (setting("ranks", []), "ranks=[] is not allowed: site pattern -> rank"),
        (entry("backbone_class", "a\nb"), "is not plain text"),
        (setting("method", "LoRa"), "unknown method 'LoRa'; nearest: LoRA"),
        (setting("method", ["LoRA"]), "unknown method ['LoRA']"),
        (setting("method", "Recipe"), "unknown method 'Recipe'"),
        (setting("rnk", 2), "LoRA has no setting 'rnk'; it has ['alpha', "),
        (setting("rank", 3), "'blocks.0.qkv[q]/A' is [2, 8], expected [3, 8]"),
        (setting("rank", 9), "rank 9 does not fit blocks.0.qkv[q]"),
        (setting("rank", 10**30), "does not fit blocks.0.qkv[q]"),
        (setting("rank", "2"), "rank '2' is not allowed"),
        (setting("alpha", 10**400), "lacks or misstates"),
        (setting("alpha", 1e308), "alpha=1e+308 is not allowed: a finite number"),
        (setting("alpha", [1]), "alpha=[1] is not allowed"),
        (setting("ranks", {"**." * 40 + "x": 1}), "which fits none of the 4 sites"),
        (site("path", "blocks.*"), "nothing in Net is called"),
        (site("path", "blocks.0.{qkv,mlp}"), "nothing in Net is called"),
        (site("path", "../../x"), "nothing in Net is called '../../x[q]'"),
        (site("path", "polyadapt_drawer"), "nothing in Net is called"),
        (site("path", ""), "nothing in Net is called"),
        (site("path", None), "is not plain text"),
        (site("path", ["blocks"]), "is not plain text"),
        (site("parameter", "wight"), "nothing in Net is called"),
        (site("parameter", None), "was a linear [8, 8]"),
        (site("part", "w"), "has parts q,k,v, not 'w'"),
        (site("part", 3), "is not plain text"),
        (site("rows", [0, 4]), "blocks.0.qkv[q] was a linear [8, 8]"),
        (site("rows", []), "lacks or misstates"),
        (site("rows", [-8, 0]), "lacks or misstates rows [-8, 0]"),
        (site("rows", "ab"), "lacks or misstates"),
        (site("shape", [8, 10**15]), "was a linear [8, 1000000000000000]"),
        (site("shape", 3), "lacks or misstates"),
        (site("kind", "embedding"), "was a embedding [8, 8]"),
        (site("kind", "a\nb"), "is not plain text"),
        (site("slot", "input"), "slot='input' is not allowed: weight or output"),
        (repeat, "names the same weight as"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(
    file: Path, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    assert complaint in refused(net(), edit(file, record=change))


@pytest.mark.parametrize("key", ["name", "recipe", "sites", "fingerprint", "extra", "versions"])
def test_a_record_that_lacks_an_entry_is_refused(file: Path, key: str) -> None:
    assert f"'{key}'" in refused(net(), edit(file, record=lambda record: record.pop(key)))
