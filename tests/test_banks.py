"""A bank: tensors that the adapters of a set share are owned, trained, copied and saved once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from polyadapt.core import (
    AdaptedModule,
    Adapter,
    AdapterSet,
    LoRA,
    Recipe,
    Site,
    activate,
    attach,
    combine,
    load,
    sets_of,
    stack,
)
from polyadapt.core.adapters import recipes
from polyadapt.core.banks import BANK, bank_of
from polyadapt.core.errors import SiteError, StoreError
from polyadapt.core.layers import FrozenLayer
from polyadapt.core.merge_file import merge_file
from polyadapt.core.store import inspect_file
from polyadapt.tests.saved_sets import edit, refused
from polyadapt.tests.saved_sets import net as backbone

AT = "blocks.*.mlp"
INPUT = torch.linspace(-1, 1, 2 * 3 * 8).view(2, 3, 8)


class Pair(nn.Module):
    """A trained and a frozen factor: a parameter and a buffer."""

    B: Tensor

    def __init__(self, generator: Generator | None, start: float) -> None:
        super().__init__()
        self.A = nn.Parameter(start * torch.randn(2, 8, generator=generator))
        self.register_buffer("B", torch.randn(8, 2, generator=generator))


class Vector(Adapter):
    """W + B diag(v) A with a vector of its own."""

    bank: Pair

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.ones(2))

    def factors(self) -> tuple[Tensor, Tensor, Tensor, float]:
        return self.bank.A, self.bank.B, self.v, 1.0

    def weight(self, w: Tensor) -> Tensor:
        return w + self.bank.B @ (self.v[:, None] * self.bank.A)

    def output(self, x: Tensor, y: Tensor, layer: FrozenLayer) -> Tensor:
        return y + layer.up(layer.down(x, self.v[:, None] * self.bank.A), self.bank.B)


@dataclass(frozen=True, kw_only=True)
class Shared(Recipe):
    """Two factors for all sites; `start` 0 hides every vector from the first gradient."""

    start: float = 1.0

    def build_bank(self, sites: Sequence[Site], generator: Generator | None) -> nn.Module:
        return Pair(generator, self.start)

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        return Vector()


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method has a file name of its own in no release; a saved set is read by its name."""
    monkeypatch.setitem(recipes(), "Shared", Shared)


def shared(model: nn.Module, name: str = "pets", seed: int = 3, start: float = 1.0) -> AdapterSet:
    made = attach(model, Shared(start=start), AT, name, generator=Generator().manual_seed(seed))
    with torch.no_grad():
        for n, vector in enumerate(vectors(made)):
            vector.v.add_(n)
    return made


def vectors(made: AdapterSet) -> list[Vector]:
    return [a for a in made.adapters.values() if isinstance(a, Vector)]


def pair(made: AdapterSet) -> Pair:
    assert isinstance(made.bank, Pair)
    return made.bank


def gradient(made: AdapterSet) -> Tensor:
    found = pair(made).A.grad
    assert found is not None
    return found


# One owner


def test_all_adapters_refer_to_the_one_bank_of_their_set() -> None:
    made = shared(backbone())
    assert len(vectors(made)) == 2
    assert all(vector.bank is made.bank for vector in vectors(made))
    assert bank_of(made.adapters) is made.bank


def test_every_tensor_of_a_bank_is_counted_trained_and_named_once() -> None:
    model = backbone()
    made = shared(model)
    assert made.trainable_count() == 2 * 8 + 2 * 2
    assert made.stored_count() == 2 * 2 * 8 + 2 * 2  # the buffer is stored, too
    (matrices, vectors_of) = made.parameter_groups(lr=1.0)
    assert [id(p) for p in matrices["params"]] == [id(pair(made).A)]
    assert len(vectors_of["params"]) == 2
    named = [name for name, _ in model.named_parameters() if name.endswith(".A")]
    assert named == ["polyadapt_drawer.holder.set_pets.bank.A"]


def test_its_names_are_those_of_no_site() -> None:
    made = shared(backbone())
    own = [".bank/A", ".bank/B", "blocks.0.mlp/v", "blocks.1.mlp/v"]
    assert sorted(made.state_dict()) == own
    assert sorted(made.trained()) == [name for name in own if name != ".bank/B"]
    assert all(not site.name.startswith(BANK) for site in made.sites)


def test_a_banks_gradient_is_the_sum_over_its_sites() -> None:
    found = []
    for at in ("blocks.0.mlp", "blocks.1.mlp", AT):
        layers = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
        model = nn.Sequential()
        model.blocks = nn.ModuleList(nn.ModuleDict({"mlp": layer}) for layer in layers)
        made = attach(model, Shared(), at, generator=Generator().manual_seed(0))
        for site in made.sites:  # one input for both, so that nothing else depends on the other
            model.get_submodule(site.path)(INPUT).sum().backward()
        found.append(gradient(made))
    first, second, both = found
    assert torch.allclose(first + second, both, rtol=1e-5)


def test_a_frozen_set_freezes_its_bank_and_an_active_one_wakes_it() -> None:
    model = backbone()
    made = shared(model)
    shared(model, "cars")
    assert not pair(made).A.requires_grad
    with activate(model, "pets"):
        assert pair(made).A.requires_grad
    made.freeze()
    with activate(model, "pets"):
        assert not pair(made).A.requires_grad


# Copies


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_refers_to_its_own_bank(how: Any) -> None:
    model = backbone()
    made = shared(model)
    twin = sets_of(how(model))["pets"]
    assert twin.bank is not made.bank
    assert all(vector.bank is twin.bank for vector in vectors(twin))
    with torch.no_grad():
        pair(twin).A.zero_()
    assert bool(pair(made).A.any())


def test_a_set_that_is_combined_alone_has_a_bank_of_its_own() -> None:
    model = backbone()
    made = shared(model)
    twin = combine(model, {"pets": 1.0}, "twin")
    assert twin.bank is not made.bank
    assert all(vector.bank is twin.bank for vector in vectors(twin))
    assert torch.equal(pair(twin).A, pair(made).A)


def test_a_weighted_sum_of_sets_with_banks_is_exact() -> None:
    model = backbone()
    pets, cars = shared(model), shared(model, "cars", seed=4)
    combine(model, {"pets": 0.5, "cars": -2.0})
    mixed = model(INPUT)
    weights = {}
    for site in pets.sites:
        w = model.get_parameter(f"{site.path}.weight").detach()
        own = [vectors(s)[pets.sites.index(site)].weight(w) - w for s in (pets, cars)]
        weights[site.path] = w + 0.5 * own[0] - 2.0 * own[1]
    other = backbone()
    with torch.no_grad():
        for path, weight in weights.items():
            other.get_parameter(f"{path}.weight").copy_(weight)
    assert torch.allclose(other(INPUT), mixed, atol=1e-4)


# The file


def test_a_file_holds_the_bank_once_and_gives_the_same_bits(tmp_path: Path) -> None:
    model, other, path = backbone(), backbone(), tmp_path / "pets.safetensors"
    shared(model).save(path)
    loaded = load(other, path)
    assert torch.equal(other(INPUT), model(INPUT))
    assert sorted(load_file(path)) == sorted(loaded.state_dict())
    assert "bank, shared by all sites: A [2, 8], B [8, 2]" in inspect_file(path)


def test_a_file_of_a_method_without_a_bank_has_none_and_may_have_none(tmp_path: Path) -> None:
    model, path = backbone(), tmp_path / "pets.safetensors"
    attach(model, LoRA(rank=2), AT).save(path)
    assert not any(key.startswith(BANK) for key in load_file(path))
    assert "bank" not in inspect_file(path)
    edit(path, tensors=lambda held: held.update({f"{BANK}/A": torch.ones(2, 8)}))
    assert "'.bank/A' does not belong to it" in refused(backbone(), path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda held: held.pop(".bank/B"), "'.bank/B' is missing"),
        (lambda held: held.update({".bank/A": torch.ones(3, 8)}), "is [3, 8], expected [2, 8]"),
    ],
)
def test_a_damaged_bank_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "pets.safetensors"
    shared(backbone()).save(path)
    edit(path, tensors=change)
    assert words in refused(backbone(), path)


def test_numbers_that_a_method_refuses_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_state(recipe: Recipe, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
        if float(state[".bank/B"].max()) > 9:
            raise StoreError("B is too large")

    monkeypatch.setattr(Shared, "check_state", check_state)
    path = tmp_path / "pets.safetensors"
    shared(backbone()).save(path)
    load(backbone(), path)
    edit(path, tensors=lambda held: held[".bank/B"].add_(99))
    assert "B is too large" in refused(backbone(), path)


def test_a_file_with_a_bank_merges_into_a_checkpoint(tmp_path: Path) -> None:
    model, path = backbone(), tmp_path / "pets.safetensors"
    save_file(backbone().state_dict(), tmp_path / "base.safetensors")
    shared(model).save(path)
    merge_file(path, tmp_path / "base.safetensors", tmp_path / "merged.safetensors")
    other = backbone()
    other.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    assert torch.allclose(other(INPUT), model(INPUT), atol=1e-5)


# Batches of many sets


def test_what_a_mixed_batch_keeps_is_read_again_when_the_bank_changes() -> None:
    model = backbone()
    made = shared(model)
    shared(model, "cars", seed=4)
    made.freeze()
    with torch.no_grad(), activate(model, per_sample=["pets", "cars"]):
        before = model(INPUT)
        pair(made).A.mul_(2)
        after = model(INPUT)
        pair(made).B.mul_(2)
        last = model(INPUT)
    assert [torch.equal(a[0], b[0]) for a, b in ((before, after), (after, last))] == [False, False]
    assert torch.equal(before[1], after[1])
    with torch.no_grad(), activate(model, "pets"):
        assert torch.allclose(model(INPUT[:1])[0], last[0], atol=1e-5)


def test_sets_with_banks_are_stacked() -> None:
    model = backbone()
    for seed, name in enumerate(("pets", "cars")):
        shared(model, name, seed).freeze()
    served = stack(model)
    with served.route(served.index(["cars", "pets"])):
        routed = model(INPUT)
    with activate(model, per_sample=["cars", "pets"]):
        assert torch.allclose(model(INPUT), routed, atol=1e-6)


# Proofs and training


def test_a_factor_that_starts_at_zero_does_not_hide_a_site_that_nothing_calls() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    attach(Half(), Shared(start=0.0), at="used", probe=INPUT)
    with pytest.raises(SiteError, match="1 of 2 adapters of 'default' do not act: spare;"):
        attach(Half(), Shared(start=0.0), at=["used", "spare"], probe=INPUT)


class Task(AdaptedModule):
    def training_loss(self, batch: Any) -> Tensor:
        loss: Tensor = self.backbone(batch).square().mean()
        return loss


def test_a_checkpoint_of_a_run_holds_the_bank() -> None:
    task = Task(backbone(), Shared(), AT, seed=0)
    held = task.state_dict()
    assert sorted(held)[:2] == ["adapter/.bank/A", "adapter/.bank/B"]
    other = Task(backbone(), Shared(), AT, seed=1)
    assert not torch.equal(pair(other.adapters).A, pair(task.adapters).A)
    other.load_state_dict(held)
    assert torch.equal(pair(other.adapters).A, pair(task.adapters).A)
    assert all(vector.bank is other.adapters.bank for vector in vectors(other.adapters))


def test_ddp_sees_the_bank_once(tmp_path: Path) -> None:
    model = backbone()
    made = shared(model)
    alone = copy.deepcopy(model)
    alone(INPUT).square().sum().backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        DistributedDataParallel(model)(INPUT).square().sum().backward()
    finally:
        dist.destroy_process_group()
    assert torch.allclose(gradient(made), gradient(sets_of(alone)["pets"]))
