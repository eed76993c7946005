"""`polyadapt adapters combine`: what the function writes, from files alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyadapt.core import AdaLoRA, HeadOnly, LoRA, Recipe, attach, cli, combine, load
from polyadapt.core.combine_file import combine_files
from polyadapt.core.combine_rule import Rule
from polyadapt.core.errors import AdaptError, StoreError
from polyadapt.core.store import read_file
from polyadapt.tests.saved_sets import INPUT, METHODS, Net, edit, net, wake


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two LoRA files of one backbone, with other ranks and sites."""
    model = net()
    places = [(LoRA(rank=2), "blocks.*.qkv[q,v]"), (LoRA(rank=3, alpha=1.5), "{blocks.1.mlp,head}")]
    for name, (recipe, at) in zip(("one", "two"), places, strict=True):
        made = wake(attach(model, recipe, at, name))
        made.head = {"w": torch.ones(2)}
        made.save(tmp_path / f"{name}.safetensors")
    return tmp_path / "one.safetensors", tmp_path / "two.safetensors"


def loaded(*paths: Path) -> Net:
    model = net()
    for path in paths:
        load(model, path)
    return model


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--method", "svd", "--rank", "2"],
        ["--method", "ties", "--rank", "2", "--density", "0.5"],
        ["--method", "dare", "--rank", "2", "--density", "0.5", "--seed", "7"],
    ],
    ids=lambda options: options[1] if options else "exact",
)
def test_the_command_writes_what_the_function_attaches(
    pair: tuple[Path, Path], tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    argv = ["adapters", "combine", *map(str, pair), "--weights", "0.75", "-0.5", "--out", str(out)]
    assert cli.main([*argv, *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    first, *sites = printed.out.splitlines()
    assert first.startswith(f"{out}: 0.75 one + -0.5 two by ")
    asked = dict(zip(options[::2], options[1::2], strict=True))
    model = loaded(*pair)
    expected = combine(
        model,
        {"one": 0.75, "two": -0.5},
        method=asked.get("--method", "exact"),  # type: ignore[arg-type]
        rank=int(asked["--rank"]) if "--rank" in asked else None,
        density=float(asked["--density"]) if "--density" in asked else None,
        seed=int(asked.get("--seed", 0)),
    )
    fresh = net()
    found = load(fresh, out)
    assert found.recipe == expected.recipe
    assert found.extra == expected.extra
    assert found.head.keys() == expected.head.keys() == {"w"}
    assert torch.equal(fresh(INPUT), model(INPUT))
    assert len(sites) == len(expected.sites) == 6
    error = expected.extra["combined"]["errors"]["blocks.1.mlp"]
    rank = len(expected.adapters["blocks.1.mlp"].state_dict()["A"])
    assert f"blocks.1.mlp  rank {rank}  error {error:.3g}" in sites


def test_adalora_files_add_as_attached_sets_do(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "ada.safetensors"
    wake(attach(model, AdaLoRA(rank=2), "blocks.*.mlp", "ada")).save(path)
    combine_files({path: 0.5}, tmp_path / "out.safetensors", Rule())
    fresh = net()
    load(fresh, tmp_path / "out.safetensors")
    combine(model, {"ada": 0.5})
    assert torch.equal(fresh(INPUT), model(INPUT))


@pytest.mark.parametrize(("recipe", "at"), METHODS, ids=lambda v: type(v).__name__)
def test_one_file_at_weight_1_is_itself(recipe: Recipe, at: str | None, tmp_path: Path) -> None:
    one, out = tmp_path / "one.safetensors", tmp_path / "out.safetensors"
    wake(attach(net(), recipe, at, "one")).save(one)
    assert combine_files({one: 1.0}, out, Rule(), "one") == f"{out}: {one} itself, as 'one'"
    assert out.read_bytes() == one.read_bytes()


def refused(weights: dict[str | Path, float], out: Path, name: str = "combined") -> str:
    """The one line of a refusal that leaves nothing behind."""
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    with pytest.raises(AdaptError) as error:
        combine_files(weights, out, Rule(), name)
    assert str(error.value).isprintable()
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before
    return str(error.value)


def test_files_that_cannot_be_combined_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pair
    out = tmp_path / "out.safetensors"
    assert "named twice" in refused({one: 1.0, str(one): 1.0}, out)
    assert f"--out {two} is what is read" in refused({one: 1.0, two: 1.0}, two)
    assert "has weight nan" in refused({one: float("nan")}, out)
    assert "combine needs sets" in refused({}, out)
    assert "every weight is 0" in refused({one: 0.0}, out)
    assert "a set's name has letters" in refused({one: 1.0}, out, "a b")
    assert "there is no adapter file" in refused({one: 1.0, tmp_path / "none": 1.0}, out)


def test_files_of_other_backbones_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other, out = tmp_path / "other.safetensors", tmp_path / "out.safetensors"
    model = net()
    with torch.no_grad():
        model.blocks[0].qkv.weight.add_(1)  # type: ignore[union-attr, operator]
    wake(attach(model, LoRA(rank=2), "blocks.*.qkv[q,v]", "other")).save(other)
    line = refused({pair[0]: 1.0, other: 1.0}, out)
    assert "other weights than those before it: blocks.0.qkv.weight differs" in line
    edit(pair[1], record=lambda r: r.update(backbone_class="somebody.Else"))
    assert "is for a somebody.Else" in refused({pair[0]: 1.0, pair[1]: 1.0}, out)


@pytest.mark.parametrize(
    ("recipe", "at"), [m for m in METHODS if type(m[0]) not in (LoRA, AdaLoRA, HeadOnly)]
)
def test_methods_without_a_low_rank_update_are_refused(
    recipe: Recipe, at: str | None, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other, out = tmp_path / "other.safetensors", tmp_path / "out.safetensors"
    wake(attach(net(), recipe, at, "other")).save(other)
    line = refused({other: 0.5}, out)
    method = type(recipe.deployed()).__name__
    assert f"{method} has no low-rank" in line or f"({method}) has no low-rank" in line


def test_a_set_without_sites_has_nothing_to_combine(tmp_path: Path) -> None:
    attach(net(), HeadOnly()).save(tmp_path / "head.safetensors")
    line = refused({tmp_path / "head.safetensors": 0.5}, tmp_path / "out.safetensors")
    assert line == "set 'default' has no sites: nothing to combine"


def test_a_forged_shape_asks_for_no_memory(pair: tuple[Path, Path], tmp_path: Path) -> None:
    huge = [1 << 40, 1 << 40]
    edit(pair[0], record=lambda record: [site.update(shape=huge) for site in record["sites"]])
    line = refused({pair[0]: 0.5}, tmp_path / "out.safetensors")
    assert "has too few numbers for its shape [1099511627776, 1099511627776]" in line


def test_tensors_that_do_not_belong_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    edit(pair[0], tensors=lambda held: held.update({"more/A": torch.ones(2)}))
    assert "does not belong to it" in refused({pair[0]: 0.5}, tmp_path / "out.safetensors")
    edit(pair[1], tensors=lambda held: held.update({"head/A": torch.ones(3, 9)}))
    assert "head/A" in refused({pair[1]: 0.5}, tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--weights", "1"], "--weights: 1 weights for 2 different files"),
        (["--weights", "1", "x"], "invalid float value: 'x'"),
        (["--method", "sum"], "combine by 'sum' is not known"),
        (["--method", "svd"], "needs a rank"),
        (["--rank", "two"], "invalid int value: 'two'"),
        (["--method", "svd", "--rank", "100"], "rank 100 is more than the result can have"),
    ],
)
def test_wrong_words_are_one_line_and_code_2(
    pair: tuple[Path, Path],
    tmp_path: Path,
    argv: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.safetensors"
    assert cli.main(["adapters", "combine", *map(str, pair), "--out", str(out), *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert line in printed.err
    assert not out.exists()


def test_what_is_read_is_checked_as_ever(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pair[0].write_bytes(pair[0].read_bytes()[:-8])
    with pytest.raises(StoreError, match="truncated"):
        combine_files({pair[0]: 1.0, pair[1]: 1.0}, tmp_path / "out.safetensors", Rule())
    assert read_file(pair[1]).name == "two"
