"""The digest of frozen weights: what it sees, and which weights a set stands for."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from polyadapt.core import Bottleneck, HeadOnly, LoRA, attach, load, select
from polyadapt.core.errors import StoreError
from polyadapt.core.fingerprint import digest, fingerprint, frozen_weights

# 3300 numbers: in fp32 three rows of 512 words, which are 1024 numbers each, and a tail of 228.
SHAPE = (60, 55)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def changed(at: dict[int, float]) -> Tensor:
    """The random tensor with some entries, counted flat, replaced."""
    new = random(*SHAPE)
    for index, value in at.items():
        new.view(-1)[index] = value
    return new


def flipped(tensor: Tensor, bit: int) -> Tensor:
    """One bit of the raw bytes turned over."""
    new = tensor.clone()
    raw = new.view(-1).view(torch.uint8)
    raw[bit // 8] ^= 1 << (bit % 8)
    return new


# ---- what it sees


def test_equal_tensors_have_equal_digests() -> None:
    assert digest(random(*SHAPE)) == digest(random(*SHAPE).clone())


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (5, 1029), (0, 3299), (3100, 3200)])
def test_two_swapped_entries_are_seen(pair: tuple[int, int]) -> None:
    flat = random(*SHAPE).view(-1)
    first, second = pair
    new = changed({first: float(flat[second]), second: float(flat[first])})
    assert digest(new) != digest(random(*SHAPE))


def test_two_swapped_rows_are_seen() -> None:
    order = [1, 0, *range(2, 60)]
    assert digest(random(*SHAPE)[order]) != digest(random(*SHAPE))


@pytest.mark.parametrize("pair", [(1, 3), (0, 1), (1, 1025), (1, 3101), (1025, 2051)])
def test_two_sign_flips_are_seen(pair: tuple[int, int]) -> None:
    """Flips of two top bits cancel in a plain sum of words."""
    flat = random(*SHAPE).view(-1)
    new = changed({index: -float(flat[index]) for index in pair})
    assert digest(new) != digest(random(*SHAPE))


@pytest.mark.parametrize("pair", [(0, 8), (0, 1024), (1, 2)])  # one row, one column
def test_one_more_here_and_one_less_there_is_seen(pair: tuple[int, int]) -> None:
    whole = torch.arange(4096)
    new = whole.clone()
    new[pair[0]] += 1
    new[pair[1]] -= 1
    assert digest(new) != digest(whole)


def test_a_transposition_is_seen() -> None:
    square = random(40, 40)
    assert digest(square.T) != digest(square)
    assert digest(random(*SHAPE).T) != digest(random(*SHAPE))


def test_the_layout_in_memory_does_not_matter() -> None:
    assert digest(random(*SHAPE).T.contiguous().T) == digest(random(*SHAPE))


def test_a_view_between_two_words_has_the_digest_of_its_copy() -> None:
    store = random(3301)
    view = store[1:]  # 4 bytes after the start of a word
    assert view.data_ptr() % 8 == 4
    assert digest(view) == digest(view.clone())


def test_the_shape_is_part_of_the_digest() -> None:
    assert digest(random(*SHAPE)) != digest(random(*SHAPE).view(55, 60))
    assert digest(torch.zeros(0, 3)) != digest(torch.zeros(3, 0))
    assert digest(torch.zeros(())) != digest(torch.zeros(1))


def test_the_dtype_is_part_of_the_digest() -> None:
    zeros = [torch.zeros(8, dtype=d) for d in (torch.float32, torch.int32, torch.float16)]
    assert len({digest(z) for z in zeros}) == 3
    assert digest(random(*SHAPE).bfloat16()) != digest(random(*SHAPE))


def test_minus_zero_is_not_zero() -> None:
    assert digest(torch.zeros(2000)) != digest(-torch.zeros(2000))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool],
)
def test_every_dtype_has_its_digest_and_a_flipped_bit_changes_it(dtype: torch.dtype) -> None:
    whole = (random(5003) * 50).to(dtype)
    bit = 0 if dtype == torch.bool else 3  # of entry 4000; a bool has no other bit
    other = flipped(whole, 8 * whole.element_size() * 4000 + bit)
    assert digest(whole) == digest(whole.clone())
    assert digest(whole) != digest(other)


def test_each_of_two_hundred_flipped_bits_is_seen() -> None:
    whole = random(*SHAPE)
    own = digest(whole)
    bits = torch.randperm(32 * whole.numel(), generator=Generator().manual_seed(1))[:200]
    seen = {digest(flipped(whole, int(bit))) for bit in bits}
    assert own not in seen
    assert len(seen) == 200  # and each change looks different


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 32 * 3300 - 1), min_size=1, max_size=3, unique=True))
def test_up_to_three_flipped_bits_are_always_seen(bits: list[int]) -> None:
    """Row and column sums miss balanced rectangles, which need four."""
    whole = random(*SHAPE)
    new = whole
    for bit in bits:
        new = flipped(new, bit)
    assert digest(new) != digest(whole)


# ---- which weights a set stands for


def model() -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    return nn.Sequential(nn.Linear(8, 8), block, nn.LayerNorm(8))


def test_a_layer_stands_for_its_weight() -> None:
    net = model()
    names = ["0.weight", "2.bias"]
    here = fingerprint(net, select(net, ["0", "2.bias"]))
    assert here == {name: digest(net.get_parameter(name)) for name in names}


def test_parts_of_one_weight_are_one_entry() -> None:
    net = nn.ModuleDict({"qkv": nn.Linear(4, 12)})
    assert list(fingerprint(net, select(net, "qkv[q,k,v]"))) == ["qkv.weight"]


def test_a_block_stands_for_all_parameters_below_it() -> None:
    net = model()
    assert sorted(fingerprint(net, select(net, "1"))) == [
        "1.0.bias",
        "1.0.weight",
        "1.2.bias",
        "1.2.weight",
    ]


def test_a_block_does_not_stand_for_its_namesake() -> None:
    net = nn.ModuleDict({"h": nn.Sequential(nn.Linear(2, 2)), "h1": nn.Sequential(nn.Linear(2, 2))})
    assert sorted(fingerprint(net, select(net, "h"))) == ["h.0.bias", "h.0.weight"]


def test_no_sites_stand_for_the_whole_backbone() -> None:
    net = model()
    assert set(fingerprint(net, [])) == set(net.state_dict())


def test_attached_sets_are_not_part_of_the_backbone() -> None:
    net = model()
    before = fingerprint(net, [])
    attach(net, LoRA(rank=2), at="0")
    assert fingerprint(net, []) == before


def test_a_merged_set_is_fingerprinted_by_the_original_weights() -> None:
    net = model()
    made = attach(net, LoRA(rank=2), at="{0,1.2}")
    for adapter in made.adapters.values():
        nn.init.ones_(adapter.get_parameter("B"))
    before = fingerprint(net, made.sites)
    originals = frozen_weights(net, made.sites)
    made.merge()
    assert not torch.equal(net.get_parameter("0.weight"), originals["0.weight"])
    assert fingerprint(net, made.sites) == before
    assert frozen_weights(net, made.sites)["0.weight"] is originals["0.weight"]


# ---- what it is for


@pytest.mark.parametrize(
    ("recipe", "at", "name"),
    [
        (LoRA(rank=2), "1.0", "1.0.weight"),
        (Bottleneck(rank=2), "1", "1.0.weight"),  # a weight inside the block
        (Bottleneck(rank=2), "1", "1.2.bias"),
        (HeadOnly(), None, "2.bias"),  # any weight of the backbone
    ],
)
def test_a_change_through_data_between_save_and_load_is_refused(
    tmp_path: Path, recipe: LoRA | Bottleneck | HeadOnly, at: str | None, name: str
) -> None:
    """A write through `.data` leaves no trace in a tensor's version."""
    net = model()
    attach(net, recipe, at).save(tmp_path / "a.safetensors")
    other = copy.deepcopy(model())
    weight = other.get_parameter(name)
    version = weight._version
    weight.data.view(-1)[0] += 1e-3
    assert weight._version == version
    with pytest.raises(StoreError, match=f"1 of .* frozen weights differ, first {name}"):
        load(other, tmp_path / "a.safetensors")
    load(model(), tmp_path / "a.safetensors")


def test_a_change_between_two_saves_is_seen_by_the_second(tmp_path: Path) -> None:
    net = model()
    made = attach(net, LoRA(rank=2), at="0")
    made.save(tmp_path / "a.safetensors")
    net.get_parameter("0.weight").data[0, 0] += 1
    made.save(tmp_path / "b.safetensors")
    with pytest.raises(StoreError, match="made on other weights"):
        load(model(), tmp_path / "b.safetensors")
    load(model(), tmp_path / "a.safetensors")


def test_weights_at_other_places_may_differ(tmp_path: Path) -> None:
    """A set knows the weights it sits on; a new classifier on top does not hinder it."""
    attach(model(), LoRA(rank=2), at="0").save(tmp_path / "a.safetensors")
    other = model()
    other.get_parameter("1.2.weight").data.zero_()
    assert load(other, tmp_path / "a.safetensors").name == "default"
