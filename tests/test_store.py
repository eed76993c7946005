"""The adapter file: what is kept in it, and how it comes back."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from polyadapt.core import (
    FullFineTuning,
    HeadOnly,
    LoRA,
    MoSA,
    Recipe,
    activate,
    attach,
    load,
    sets_of,
    switch,
)
from polyadapt.core.store import inspect_file, read_file
from polyadapt.tests.saved_sets import INPUT, METHODS, lora, net, refused, saved, wake


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A set named `pets`: see `saved`."""
    return saved(tmp_path)


# ---- there and back


@pytest.mark.parametrize(("recipe", "at"), METHODS)
def test_a_loaded_set_gives_the_same_bits(tmp_path: Path, recipe: Recipe, at: str | None) -> None:
    model = net()
    made = wake(attach(model, recipe, at))
    made.save(tmp_path / "a.safetensors")
    other = net()
    random_state = torch.get_rng_state()
    back = load(other, tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(other(INPUT), model(INPUT))
    assert back.recipe == recipe.deployed()
    assert back.sites == made.sites
    assert back.stored_count() == made.stored_count()
    with activate(other, None):
        assert torch.equal(other(INPUT), net()(INPUT))


@pytest.mark.slow
def test_the_same_bits_come_back_in_another_process_under_another_seed(tmp_path: Path) -> None:
    expected = {}
    for n, (recipe, at) in enumerate(METHODS):
        model = net()
        wake(attach(model, recipe, at)).save(tmp_path / f"{n}.safetensors")
        expected[n] = hashlib.sha256(model(INPUT).detach().numpy().tobytes()).hexdigest()
    assert len(set(expected.values())) == len(METHODS)
    code = (
        "import hashlib, sys, torch\n"
        "from polyadapt.core import load\n"
        "from polyadapt.tests.saved_sets import INPUT, net\n"
        "torch.manual_seed(12345)\n"
        "for path in sys.argv[1:]:\n"
        "    model = net()\n"
        "    load(model, path)\n"
        "    print(hashlib.sha256(model(INPUT).detach().numpy().tobytes()).hexdigest())\n"
    )
    paths = [str(tmp_path / f"{n}.safetensors") for n in expected]
    ran = subprocess.run(
        [sys.executable, "-c", code, *paths],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert ran.stdout.split() == list(expected.values())


def test_what_a_file_holds(file: Path) -> None:
    held = read_file(file)
    assert (held.name, held.recipe) == ("pets", LoRA(rank=2))
    assert [site.name for site in held.sites] == [
        "blocks.0.qkv[q]",
        "blocks.0.qkv[v]",
        "blocks.1.qkv[q]",
        "blocks.1.qkv[v]",
    ]
    assert held.sites[1].rows == (16, 24)
    assert "blocks.1.qkv[v]/A" in held.tensors
    assert sorted(held.fingerprint) == ["blocks.0.qkv.weight", "blocks.1.qkv.weight"]
    assert held.extra == {"labels": ["cat", "dog"]}
    assert list(held.head) == ["weight"]
    assert held.backbone_class.endswith(".Net")
    assert {"python", "torch", "polyadapt"} <= set(held.versions)


def test_a_file_is_read_by_plain_safetensors_too(file: Path) -> None:
    from safetensors.torch import load_file

    assert load_file(file).keys() >= read_file(file).tensors.keys()


def test_head_and_extras_come_back_with_the_set(file: Path) -> None:
    back = load(net(), file)
    assert back.extra == {"labels": ["cat", "dog"]}
    assert torch.equal(back.head["weight"], torch.ones(2, 3))


def test_a_site_called_head_is_no_tensor_of_the_tasks_head(tmp_path: Path) -> None:
    model = net()
    made = lora(model, at="head")
    made.head = {"A": torch.ones(1)}  # even under the name of an adapter's own tensor
    made.save(tmp_path / "a.safetensors")
    other = net()
    back = load(other, tmp_path / "a.safetensors")
    assert torch.equal(other(INPUT), model(INPUT))
    assert torch.equal(back.head["A"], torch.ones(1))


def test_saving_twice_gives_the_same_bytes(file: Path, tmp_path: Path) -> None:
    model = net()
    load(model, file).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_a_merged_set_is_saved_as_it_was(file: Path, tmp_path: Path) -> None:
    made = load(net(), file)
    made.merge()
    made.save(tmp_path / "merged.safetensors")
    assert (tmp_path / "merged.safetensors").read_bytes() == file.read_bytes()


def test_a_layer_with_any_name_can_be_saved(tmp_path: Path) -> None:
    """Names that no pattern can spell are found again by the very path."""
    layers = {"a b/c": nn.Linear(4, 4), "[q]{x,y}*": nn.Linear(4, 4), "über": nn.Linear(4, 4)}
    model = nn.ModuleDict({"all": nn.ModuleDict(layers)})
    root = nn.Sequential(model)
    made = lora(root, at="all.*")
    made.save(tmp_path / "a.safetensors")
    made.detach()
    assert load(root, tmp_path / "a.safetensors").sites == made.sites


def test_a_backbone_that_is_one_layer_can_be_saved(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    made = wake(attach(model, FullFineTuning()))
    made.save(tmp_path / "a.safetensors")
    adapted = model(torch.ones(4))
    made.detach()
    load(model, tmp_path / "a.safetensors")
    assert torch.equal(model(torch.ones(4)), adapted)


def test_a_slot_that_was_asked_for_is_kept(tmp_path: Path) -> None:
    from polyadapt.core import select

    model = net()
    attach(model, LoRA(rank=2), select(model, "blocks.*.mlp", slot="weight")).save(
        tmp_path / "a.safetensors"
    )
    assert {s.slot for s in load(net(), tmp_path / "a.safetensors").sites} == {"weight"}


def test_files_of_every_header_length_can_be_read(tmp_path: Path) -> None:
    """A header of 0x..80 bytes makes a file begin as a pickle does."""
    model = net()
    made, starts = lora(model, at="head"), set()
    for n in range(40):
        made.extra = {"note": "x" * 8 * n}
        made.save(tmp_path / "a.safetensors")
        starts.add((tmp_path / "a.safetensors").read_bytes()[0])
        assert read_file(tmp_path / "a.safetensors").extra == made.extra
    assert 0x80 in starts


def test_training_state_is_kept_when_asked(tmp_path: Path) -> None:
    made = attach(net(), MoSA(rank=4, experts=2), at="blocks.*")
    made.save(tmp_path / "plain.safetensors")
    made.save(tmp_path / "all.safetensors", training_state=True)
    assert read_file(tmp_path / "plain.safetensors").recipe == MoSA(rank=4, experts=2).deployed()
    back = load(net(), tmp_path / "all.safetensors", trainable=True)
    assert back.recipe == MoSA(rank=4, experts=2)
    assert all(torch.equal(t, made.state_dict()[k]) for k, t in back.state_dict().items())


# ---- how a set is loaded


def test_a_loaded_set_is_frozen_and_stays_so(file: Path) -> None:
    model = net()
    back = load(model, file)
    switch(model, "pets")
    with activate(model, "pets"):
        assert not any(p.requires_grad for p in model.parameters())
    assert not back.trainable


def test_a_set_can_be_loaded_to_train_on(file: Path) -> None:
    model = net()
    back = load(model, file, trainable=True)
    assert all(p.requires_grad for p in back.parameters())
    model(INPUT).sum().backward()
    assert all(p.grad is not None for p in back.parameters())
    assert all(p.grad is None for p in (*model.head.parameters(),))


def test_a_loaded_set_acts_and_can_have_another_name(file: Path) -> None:
    model = net()
    assert load(model, file).name == "pets"
    second = load(model, file, name="cats")
    assert list(sets_of(model)) == ["pets", "cats"]
    assert second.name == "cats"
    adapted = net()
    lora(adapted)
    assert torch.equal(model(INPUT), adapted(INPUT))


def test_loading_onto_half_a_backbone_needs_consent(file: Path) -> None:
    model = net().bfloat16()
    assert "made on other weights: 2 of 2 frozen weights differ" in refused(model, file)
    with pytest.warns(UserWarning, match="2 of 2 frozen weights differ, first blocks.0.qkv"):
        back = load(model, file, strict=False)
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    assert model(INPUT.bfloat16()).dtype == torch.bfloat16


def test_the_warning_points_at_the_caller(file: Path) -> None:
    with pytest.warns(UserWarning, match="other weights") as caught:
        load(net().bfloat16(), file, strict=False)
    assert caught[0].filename == __file__


# ---- a look inside


def test_inspecting_tells_what_a_file_holds(file: Path) -> None:
    lines = inspect_file(file).splitlines()
    assert lines[0].startswith(f"{file}: set 'pets', LoRA(rank=2, ")
    assert "2 frozen weights fingerprinted" in lines[1]
    assert lines[2] == "128 numbers, 512 bytes in 8 tensors"  # 4 sites, 2 (8 + 8) numbers each
    assert lines[3] == "head: weight [2, 3]"
    assert lines[5] == "labels: ['cat', 'dog']"
    assert lines[6].split() == ["site", "shape", "kind", "slot", "why"]
    assert len(lines) == 11


def test_inspecting_a_head_alone(tmp_path: Path) -> None:
    attach(net(), HeadOnly()).save(tmp_path / "a.safetensors")
    lines = inspect_file(tmp_path / "a.safetensors").splitlines()
    assert lines[2:4] == ["0 numbers, 0 bytes in 0 tensors", "head: none"]
