"""Files of SALT's and S-SAM's sets: on other machines, on other weights, merged, combined."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from polyadapt.core import (
    SALT,
    SSAM,
    AdaptError,
    AdapterSet,
    LoRA,
    Recipe,
    activate,
    attach,
    combine,
    export_peft,
    import_peft,
    load,
    sets_of,
)
from polyadapt.core.combine_file import combine_files
from polyadapt.core.combine_rule import Rule
from polyadapt.core.errors import StoreError
from polyadapt.core.merge_file import merge_file
from polyadapt.core.store import read_file
from polyadapt.tests.factor_cases import stir
from polyadapt.tests.spectral_cases import Decomposition, by_eigenvectors, flipped, turned
from polyadapt.tests.spectral_cases import on_another_machine as moved

RECIPES = {
    "diagonal": SALT(top=2, rank=2),
    "full": SALT(top=2, rank=3, clamp="full"),
    "thin": SALT(top=1, rank=1, clamp="none"),
    "stored": SALT(top=2, rank=2, vectors="stored"),
    "SSAM": SSAM(),
    "SSAM, stored": SSAM(vectors="stored"),
}
by_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
MACHINES: dict[str, Callable[..., Decomposition]] = {
    "flipped": flipped,
    "by eigenvectors": by_eigenvectors,
}
by_machine = pytest.mark.parametrize("machine", MACHINES)
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))


def backbone(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))


def trained(model: nn.Module, recipe: Recipe, name: str = "own") -> AdapterSet:
    made = attach(model, recipe, at="{0,2}", name=name)
    stir(made)
    return made


def refused(path: Path, model: nn.Module, **options: Any) -> str:
    with pytest.raises(StoreError) as caught:
        load(model, path, **options)
    assert not sets_of(model)
    assert str(caught.value).isprintable()
    return str(caught.value)


# Other machines


@by_recipe
@by_machine
def test_a_file_restores_the_outputs_on_a_machine_with_other_signs(
    recipe: Recipe, machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = backbone(), tmp_path / "own.safetensors"
    trained(model, recipe).save(path)
    wanted = model(X)
    moved(monkeypatch, MACHINES[machine])
    other = backbone()
    untouched = other(X)
    made = load(other, path, trainable=True)
    torch.testing.assert_close(other(X), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(untouched, wanted, atol=0.05)
    other(X).sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_without_the_convention_the_signs_would_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyadapt.core.spectral._signs", lambda u: torch.ones_like(u[0]))
    model, other = backbone(), backbone()
    first = trained(model, SALT(top=2, rank=2))
    moved(monkeypatch, flipped)
    second = attach(other, SALT(top=2, rank=2), at="{0,2}")
    with torch.no_grad():
        for ours, theirs in zip(second.parameters(), first.parameters(), strict=True):
            ours.copy_(theirs)
    assert not torch.allclose(other(X), model(X), atol=0.01)
    with pytest.raises(AdaptError, match=r"0: singular vector \d of its weight is not the one"):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize("recipe", [SALT(top=2, rank=2), SSAM()], ids=["SALT", "SSAM"])
def test_vectors_that_are_others_here_are_refused_and_nothing_is_attached(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.safetensors"
    trained(backbone(), recipe).save(path)
    moved(monkeypatch, turned)
    said = refused(path, backbone())
    assert "0: singular vector 1 of its weight is not the one that the set was trained with" in said
    assert "vectors='stored'" in said


@by_machine
def test_stored_vectors_need_no_gaps(
    machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def orthogonal() -> nn.Module:
        model = backbone()
        for layer in (model[0], model[2]):  # type: ignore[index]
            u, _, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            layer.weight.data = u @ vh
        return model

    model, other, path = orthogonal(), orthogonal(), tmp_path / "own.safetensors"
    trained(model, SALT(top=2, rank=2, vectors="stored")).save(path)
    moved(monkeypatch, turned if machine == "flipped" else MACHINES[machine])
    load(other, path)
    assert torch.equal(other(X), model(X))


@by_recipe
def test_a_file_holds_what_the_docstring_says(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    trained(backbone(), recipe).save(path)
    tensors = read_file(path).tensors
    found = sum(t.numel() * t.element_size() for key, t in tensors.items() if key[:2] == "0/")
    k, both = 8, 8 + 12
    r, q = recipe.sizes_at(read_file(path).sites[0]) if isinstance(recipe, SALT) else (k, 0)
    stored = recipe.to_json()["vectors"] == "stored"
    assert found == 4 * (2 * r + 2 * q * (k - r) + (k * (both + 1) if stored else k))
    assert ("0/U" in tensors) == stored
    assert ("0/mark" in tensors) != stored


# Sets beside each other


def test_sets_share_the_vectors_of_a_weight_unless_files_bring_them(tmp_path: Path) -> None:
    model, path = backbone(), tmp_path / "own.safetensors"
    first, second = trained(model, SALT(top=2, rank=2), "a"), trained(model, SSAM(), "b")
    assert first.adapters["0"].get_buffer("U") is second.adapters["0"].get_buffer("U")
    own = trained(model, SALT(top=2, rank=2, vectors="stored"), "c")
    assert own.adapters["0"].get_buffer("U") is not first.adapters["0"].get_buffer("U")
    with activate(model, "a"):
        before = model(X)
    state = {key: t + 1 if key.endswith("/U") else t for key, t in own.state_dict().items()}
    own.load_state_dict(state)
    with activate(model, "a"):
        assert torch.equal(model(X), before)
    twin = copy.deepcopy(model)
    first.save(path)
    made = load(model, path, name="d")
    assert made.adapters["0"].get_buffer("U") is first.adapters["0"].get_buffer("U")
    with activate(twin, "c"), activate(model, "c"):
        assert torch.equal(twin(X), model(X))


# Other weights


def test_other_weights_are_refused_even_if_they_may_differ(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    trained(backbone(), SALT(top=2, rank=2)).save(path)
    with pytest.warns(UserWarning, match="made on other weights"):
        assert "vectors='stored'" in refused(path, backbone(seed=1), strict=False)
    cast = backbone().bfloat16()
    with pytest.warns(UserWarning, match="made on other weights"):
        assert "or was cast" in refused(path, cast, strict=False)


def test_a_set_with_its_vectors_passes_to_a_cast_backbone(tmp_path: Path) -> None:
    model, path = backbone(), tmp_path / "own.safetensors"
    trained(model, RECIPES["stored"]).save(path)
    cast = backbone().bfloat16()
    with pytest.warns(UserWarning, match="made on other weights"):
        load(cast, path, strict=False)
    torch.testing.assert_close(cast(X.bfloat16()).float(), model(X), rtol=0.05, atol=0.1)


def test_a_backbone_that_is_cast_later_keeps_its_sets() -> None:
    model = backbone()
    made = trained(model, SALT(top=2, rank=2))
    wanted = model(X)
    model.bfloat16()
    assert made.adapters["0"].get_buffer("U").dtype == torch.float32
    torch.testing.assert_close(model(X.bfloat16()).float(), wanted, rtol=0.05, atol=0.1)


# Merged, combined, exported


@by_recipe
def test_a_file_merges_into_a_checkpoint(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = backbone(), backbone()
    save_file(backbone().state_dict(), tmp_path / "base.safetensors")
    trained(model, recipe).save(tmp_path / "own.safetensors")
    moved(monkeypatch, flipped)
    merge_file(tmp_path / "own.safetensors", tmp_path / "base.safetensors", tmp_path / "out")
    other.load_state_dict(load_file(tmp_path / "out"))
    torch.testing.assert_close(other(X), model(X))


@by_recipe
def test_sets_combine_with_lora(recipe: Recipe) -> None:
    model = backbone()
    deltas = []
    for name, method in (("own", recipe), ("lora", LoRA(rank=2))):
        made, base = trained(model, method, name), model[0].weight  # type: ignore[index]
        with activate(model, None):
            deltas.append(made.adapters["0"].weight(base) - base)  # type: ignore[operator]
    both = combine(model, {"own": 0.5, "lora": 2.0})
    a, b, _, scale = both.adapters["0"].factors()  # type: ignore[operator]
    torch.testing.assert_close(scale * b @ a, 0.5 * deltas[0] + 2 * deltas[1])


@by_recipe
def test_peft_folders_are_loras_of_the_same_update(recipe: Recipe, tmp_path: Path) -> None:
    model, other = backbone(), backbone()
    export_peft(trained(model, recipe), tmp_path / "peft")
    import_peft(other, tmp_path / "peft")
    torch.testing.assert_close(other(X), model(X))


def test_files_without_their_backbone_are_no_use_unless_they_hold_the_vectors(
    tmp_path: Path,
) -> None:
    model, out = backbone(), tmp_path / "out.safetensors"
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("bare", "whole", "lora")}
    trained(model, SALT(top=2, rank=2), "bare").save(paths["bare"])
    trained(model, RECIPES["stored"], "whole").save(paths["whole"])
    trained(model, LoRA(rank=2), "lora").save(paths["lora"])
    with pytest.raises(AdaptError, match=r"update at 0 is in the basis of its frozen weight") as no:
        combine_files({paths["bare"]: 1.0, paths["lora"]: 1.0}, out, Rule("exact", None, None, 0))
    assert str(no.value).isprintable()
    assert not out.exists()
    combine_files({paths["whole"]: 1.0, paths["lora"]: 1.0}, out, Rule("exact", None, None, 0))
    load(model, out, name="both")
    both = model(X)
    combine(model, {"whole": 1.0, "lora": 1.0}, name="attached")
    torch.testing.assert_close(model(X), both)


@by_recipe
def test_a_mixed_batch_equals_the_loop_over_its_samples(recipe: Recipe) -> None:
    model = backbone()
    trained(model, recipe, "a")
    trained(model, LoRA(rank=2), "b")
    names = ["b", None, "a"]
    with activate(model, per_sample=names):
        mixed = model(X)
    for n, name in enumerate(names):
        with activate(model, name):
            torch.testing.assert_close(model(X[n : n + 1])[0], mixed[n])
