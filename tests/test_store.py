"""The adapter file: what is kept, what is refused, and that nothing changes when it is."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from polyadapt.core import (
    AdaptError,
    AdapterSet,
    BitFit,
    Bottleneck,
    DoRA,
    FullFineTuning,
    HeadOnly,
    LayerNormTuning,
    LoRA,
    MoSA,
    Recipe,
    activate,
    attach,
    load,
    sets_of,
    switch,
)
from polyadapt.core import container as files
from polyadapt.core.errors import StoreError
from polyadapt.core.store import inspect_file, read_file


class Net(nn.Module):
    """A fused projection, a branch called `mlp`, a layer called `head`."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        y: Tensor = x + self.mlp(torch.softmax(q @ k.mT, -1) @ v)
        return y


def net(**sizes: int) -> Net:
    """Always the same weights; the global random state is left alone."""
    made = Net(**sizes).eval()
    generator = Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return made


def wake(adapters: AdapterSet) -> AdapterSet:
    """Trained-looking numbers in place of the zeros of the start."""
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return adapters


def lora(model: nn.Module, at: str = "blocks.*.qkv[q,v]", name: str = "pets") -> AdapterSet:
    generator = Generator().manual_seed(2)
    return wake(attach(model, LoRA(rank=2), at, name, generator=generator))


INPUT = torch.linspace(-1, 1, 2 * 3 * 8).view(2, 3, 8)

METHODS: list[tuple[Recipe, str | None]] = [
    (LoRA(rank=2, alpha=3, scaling="rank_stabilised"), "blocks.*.qkv[q,v]"),
    (LoRA(rank=4, ranks={"blocks.0.*": 1}), "blocks.*.mlp"),
    (DoRA(rank=2), "{blocks.*.mlp,head}"),
    (Bottleneck(rank=2, norm=True), "blocks.*"),
    (Bottleneck(rank=2, placement="parallel"), "blocks.*.mlp"),
    (MoSA(rank=4, experts=2), "blocks.*"),
    (BitFit(), None),
    (LayerNormTuning(), None),
    (FullFineTuning(), None),
    (HeadOnly(), None),
]


def state(model: nn.Module) -> list[object]:
    """Everything of a model that attaching may touch."""
    return [
        [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
        [(name, type(module)) for name, module in model.named_modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.get_rng_state().tolist(),
    ]


def refused(model: nn.Module, path: Path, **options: Any) -> str:
    """Loading is refused in one line that names the file, and leaves the model as it was."""
    before, there = state(model), path.exists()
    with pytest.raises(StoreError) as error:
        load(model, path, **options)
    line = str(error.value)
    assert line.isprintable()
    assert str(path) in line
    assert state(model) == before
    assert path.exists() is there
    return line


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A saved set named `pets`, LoRA of rank 2 on two parts of two layers."""
    model = net()
    made = lora(model)
    made.extra = {"labels": ["cat", "dog"]}
    made.head = {"weight": torch.ones(2, 3)}
    made.save(tmp_path / "pets.safetensors")
    return tmp_path / "pets.safetensors"


def edit(
    path: Path,
    record: Callable[[dict[str, Any]], object] = lambda _: None,
    tensors: Callable[[dict[str, Tensor]], object] = lambda _: None,
) -> Path:
    """A well-made file, digest included, with something else in it."""
    held, content = files.read(path)
    record(held)
    tensors(content)
    files.write(path, held, content)
    return path


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


def test_the_same_bits_come_back_in_another_process_under_another_seed(tmp_path: Path) -> None:
    expected = {}
    for n, (recipe, at) in enumerate(METHODS):
        model = net()
        wake(attach(model, recipe, at)).save(tmp_path / f"{n}.safetensors")
        expected[n] = hashlib.sha256(model(INPUT).detach().numpy().tobytes()).hexdigest()
    assert len(set(expected.values())) == len(METHODS)
    code = (
        "import hashlib, importlib.util, sys, torch\n"
        "from polyadapt.core import load\n"
        "torch.manual_seed(12345)\n"
        "spec = importlib.util.spec_from_file_location('there', sys.argv[1])\n"
        "there = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(there)\n"
        "for path in sys.argv[2:]:\n"
        "    model = there.net()\n"
        "    load(model, path)\n"
        "    print(hashlib.sha256(model(there.INPUT).detach().numpy().tobytes()).hexdigest())\n"
    )
    paths = [str(tmp_path / f"{n}.safetensors") for n in expected]
    ran = subprocess.run(
        [sys.executable, "-c", code, __file__, *paths],
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


# ---- what is not saved


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
