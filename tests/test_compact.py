"""S2-LoRA's sets as files: the compact form, and what the verbs make of both forms."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polyadapt.core import (
    AdaptError,
    AdapterSet,
    LoRA,
    S2LoRA,
    activate,
    attach,
    combine,
    export_peft,
    load,
    stack,
)
from polyadapt.core.adapters.s2lora import S2LoRAAdapter
from polyadapt.core.cli import main
from polyadapt.core.compact import compact
from polyadapt.core.live_ranks import ranks
from polyadapt.core.peft.config import TENSORS
from polyadapt.core.store import save_form
from polyadapt.tests.peft_cases import loaded
from polyadapt.tests.saved_sets import INPUT, edit, net, refused
from polyadapt.tests.test_live_ranks import LAM, pruned

FULL = {"blocks.0.mlp": [1.0, 0.25, -0.5], "blocks.1.mlp": [0.5, 0.0, 2.0]}
DEAD = {"blocks.0.mlp": [1.0, 0.0, -0.5], "blocks.1.mlp": [0.5, 0.0, 0.0]}


def shrunk(made: AdapterSet, path: Path, **settings: Any) -> Path:
    save_form(made, path / "small.safetensors", compact(made, **settings))
    return path / "small.safetensors"


def _keep(kept: dict[str, int], record: dict[str, Any]) -> None:
    record["recipe"]["kept"] = kept


def run(*words: object) -> int:
    return main(["adapters", *map(str, words)])


# The compact form


def test_a_dead_rank_changes_nothing_and_frees_its_row_and_column(tmp_path: Path) -> None:
    model, other = net(), net()
    made = pruned(model, DEAD)
    path = shrunk(made, tmp_path, values=torch.float32)
    small = load(other, path)
    torch.testing.assert_close(other(INPUT), model(INPUT), rtol=1e-6, atol=1e-6)
    assert made.bank is not None
    assert small.bank is not None
    numbers = [sum(p.numel() for p in bank.parameters()) for bank in (made.bank, small.bank)]
    assert numbers[0] - numbers[1] == 8 + 8
    assert ranks(small) == ranks(made) == {"blocks.0.mlp": 2, "blocks.1.mlp": 1}


def test_fp32_values_are_the_sets_number_for_number(tmp_path: Path) -> None:
    model, other = net(), net()
    made = pruned(model, FULL, alpha=6.0)
    small = load(other, shrunk(made, tmp_path, values=torch.float32))
    for name in ("A_8", "B_8"):
        assert made.bank is not None
        assert small.bank is not None
        assert torch.equal(small.bank.get_parameter(name), made.bank.get_parameter(name))
    first, second = small.adapters.values()
    for adapter, own in ((first, [1.0, 0.25, -0.5]), (second, [0.5, 2.0])):
        assert isinstance(adapter, S2LoRAAdapter)
        assert adapter.lam.tolist() == own
        assert adapter.scale == 2.0
    assert small.state_dict()["blocks.1.mlp/index"].tolist() == [0, 2]
    torch.testing.assert_close(other(INPUT), model(INPUT), rtol=1e-6, atol=1e-6)


def test_half_precision_takes_the_bytes_of_the_formula(tmp_path: Path) -> None:
    model, other = net(), net()
    path = shrunk(pruned(model, DEAD), tmp_path)
    found = load_file(path)
    size = sum(t.numel() * t.element_size() for t in found.values())
    assert size == 2 * 2 * (8 + 8) + 4 * (2 + 1)  # 2 ranks of 16 numbers, 3 coefficients
    assert {t.dtype for t in found.values()} == {torch.float16, torch.int16}
    load(other, path)
    torch.testing.assert_close(other(INPUT), model(INPUT), rtol=1e-2, atol=1e-2)
    assert not torch.equal(other(INPUT), net()(INPUT))


def test_a_site_without_a_live_rank_is_left_out(tmp_path: Path) -> None:
    model, other = net(), net()
    small = load(other, shrunk(pruned(model), tmp_path, values=torch.float32))
    assert [site.name for site in small.sites] == ["blocks.0.mlp"]
    torch.testing.assert_close(other(INPUT), model(INPUT), rtol=1e-6, atol=1e-6)
    assert ranks(load(net(), shrunk(pruned(net()), tmp_path, tau=0.1))) == {"blocks.0.mlp": 1}


def test_shapes_that_no_site_keeps_leave_the_bank() -> None:
    made = attach(net(), S2LoRA(rank=2, share="dim", init="lora"), "{blocks.*.mlp,head}")
    head = made.adapters["head"]
    assert isinstance(head, S2LoRAAdapter)
    head.lam.data.zero_()
    _, sites, tensors = compact(made)
    assert {key for key in tensors if "bank" in key} == {".bank/A_8", ".bank/B_8"}
    assert len(sites) == 2


def test_a_compact_set_is_an_ordinary_one(tmp_path: Path) -> None:
    model = net()
    small = load(model, shrunk(pruned(net(), DEAD), tmp_path), trainable=True)
    y = model(INPUT)
    (y.square().mean() + small.penalty()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in small.parameters())
    small.save(tmp_path / "again.safetensors")
    assert torch.equal(
        load(other := net(), tmp_path / "again.safetensors").penalty(), small.penalty()
    )
    assert torch.equal(other(INPUT), y)
    twice, once = compact(small, values=torch.float32)[2], small.state_dict()
    assert twice.keys() == once.keys()
    assert all(torch.equal(tensor, once[key]) for key, tensor in twice.items())
    small.merge()
    torch.testing.assert_close(model(INPUT), y, rtol=1e-5, atol=1e-5)


def test_compact_sets_mix_stack_and_add_up(tmp_path: Path) -> None:
    model = net()
    path = shrunk(pruned(net(), DEAD), tmp_path)
    load(model, path)
    load(model, path, "cars")
    with activate(model, "pets"):
        alone = model(INPUT)
    with activate(model, per_sample=["cars", "pets"]):
        torch.testing.assert_close(model(INPUT), alone, rtol=1e-5, atol=1e-5)
    served = stack(model)
    with served.route(served.index(["pets", "cars"])):
        torch.testing.assert_close(model(INPUT), alone, rtol=1e-5, atol=1e-5)
    combine(model, {"pets": 0.25, "cars": 0.75})
    torch.testing.assert_close(model(INPUT), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("index", "words"),
    [([0, 2], "different ranks from 0 to 1"), ([-1, 0], "different ranks"), ([1, 1], "different")],
)
def test_a_forged_index_is_refused(tmp_path: Path, index: list[int], words: str) -> None:
    path = shrunk(pruned(net(), DEAD), tmp_path)
    wrong = torch.tensor(index, dtype=torch.int16)
    edit(path, tensors=lambda held: held.update({"blocks.0.mlp/index": wrong}))
    assert words in refused(net(), path)


def test_kept_names_the_sites_and_no_other(tmp_path: Path) -> None:
    for kept in ({"blocks.1.mlp": 1}, {"blocks.0.mlp": 2, "blocks.1.mlp": 1, "spare": 1}):
        path = shrunk(pruned(net(), DEAD), tmp_path)
        edit(path, record=partial(_keep, kept))
        assert "kept and the sites do not both have" in refused(net(), path)
        assert run("combine", path, "--weights", 2, "--out", tmp_path / "x") == 2


def test_other_methods_values_and_dead_sets_are_refused() -> None:
    model = net()
    with pytest.raises(AdaptError, match="compact is a form of S2LoRA's sets, not of LoRA's"):
        compact(attach(model, LoRA(rank=2), "blocks.*.mlp"))
    with pytest.raises(AdaptError, match=r"values=torch.float64 is not allowed: torch\.float16"):
        compact(pruned(model), values=torch.float64)
    with pytest.raises(AdaptError, match="'pets' has no live rank"):
        compact(pruned(net(), {name: [0.0] * 3 for name in LAM}))


# The verbs, on both forms


@pytest.fixture(params=["dense", "compact"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = pruned(net(), DEAD)
    if request.param == "compact":
        return shrunk(made, tmp_path, values=torch.float32)
    made.save(tmp_path / "pets.safetensors")
    return tmp_path / "pets.safetensors"


def wanted(file: Path) -> Tensor:
    model = net()
    load(model, file)
    y: Tensor = model(INPUT).detach()
    return y


def same(model: nn.Module, file: Path) -> None:
    torch.testing.assert_close(model(INPUT).detach(), wanted(file), rtol=1e-5, atol=1e-5)


def test_inspect_names_the_bank(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", file) == 0
    assert "bank, shared by all sites: A_8 [" in capsys.readouterr().out


def test_merge_writes_the_weights(file: Path, tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    out = tmp_path / "merged.safetensors"
    assert run("merge", file, "--base", tmp_path / "base.safetensors", "--out", out) == 0
    model = net()
    model.load_state_dict(load_file(out))
    same(model, file)


def test_combine_adds_files(file: Path, tmp_path: Path) -> None:
    attach(net(), LoRA(rank=2), "blocks.*.mlp", "plain").save(tmp_path / "zero.safetensors")
    out = tmp_path / "sum.safetensors"
    assert run("combine", file, tmp_path / "zero.safetensors", "--out", out) == 0
    model = net()
    assert isinstance(load(model, out).recipe, LoRA)
    same(model, file)
    assert run("combine", file, "--out", tmp_path / "copy.safetensors") == 0
    load(other := net(), tmp_path / "copy.safetensors")
    assert torch.equal(other(INPUT), wanted(file))


def test_a_forged_bank_is_refused_before_it_asks_for_memory(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def huge(record: dict[str, Any]) -> None:
        for site in record["sites"]:
            site["shape"] = [2**40, 2**40]

    edit(file, record=huge)
    for verb in (("combine", "--weights", 2, "--out", tmp_path / "x"), ("export", "--out", "x")):
        assert run(verb[0], file, *verb[1:]) == 2
        assert "'.bank/A_" in capsys.readouterr().err


def test_export_writes_the_live_ranks_for_peft(file: Path, tmp_path: Path) -> None:
    assert run("export", file, "--out", tmp_path / "by_file") == 0
    model = net()
    export_peft(load(model, file), tmp_path / "by_set")
    for folder in ("by_file", "by_set"):
        held = load_file(tmp_path / folder / TENSORS)
        assert sorted({min(t.shape) for t in held.values()}) == [1, 2]
        same(loaded(net(), tmp_path / folder), file)
