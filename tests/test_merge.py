"""Merging a set into the weights of a backbone in memory, and taking it out again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from polyadapt.core import (
    AdaptError,
    AdapterSet,
    AdapterTune,
    BitFit,
    Bottleneck,
    DoRA,
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

INPUT = torch.linspace(-1, 1, 2 * 3 * 8).view(2, 3, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.attention(q, k, v, need_weights=False)[0]
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.out(x)
        return y


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def awake(model: nn.Module, recipe: Recipe, at: str | list[str] | None, name: str) -> AdapterSet:
    """Attach with trained-looking numbers."""
    made = attach(model, recipe, at, name)
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return made


def lora(model: nn.Module, at: str | list[str] = "qkv[q,v]", name: str = "pets") -> AdapterSet:
    return awake(model, LoRA(rank=2), at, name)


def line_of(ask: Callable[[], object]) -> str:
    with pytest.raises(AdaptError) as refused:
        ask()
    assert str(refused.value).isprintable()
    return str(refused.value)


# ---- what merging does


EVERYWHERE = ["qkv[q,v]", "attention.in_proj_weight[q,v]", "attention.out_proj", "linear1", "out"]


@pytest.mark.parametrize(
    ("recipe", "at"),
    [
        (LoRA(rank=2), EVERYWHERE),
        (DoRA(rank=2), EVERYWHERE),
        (BitFit(), None),
        (FullFineTuning(), None),
    ],
)
def test_merging_gives_the_same_output_and_unmerging_the_same_bits(
    recipe: Recipe, at: list[str] | None
) -> None:
    model = net()
    untouched = model(INPUT)
    made = awake(model, recipe, at, "pets")
    adapted = model(INPUT)
    assert not torch.allclose(adapted, untouched, atol=1e-2)
    made.merge()
    torch.testing.assert_close(model(INPUT), adapted)
    made.unmerge()
    assert torch.equal(model(INPUT), adapted)
    made.detach()
    assert torch.equal(model(INPUT), untouched)


def test_a_merge_by_hand() -> None:
    """W = [[1, 2], [3, 4]], B A = [1, 10]^T [1, 1], s = 2."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    made = attach(model, LoRA(rank=1, alpha=2), at="0")
    adapter = made.adapters["0"]
    adapter.get_parameter("A").data = torch.tensor([[1.0, 1.0]])
    adapter.get_parameter("B").data = torch.tensor([[1.0], [10.0]])
    made.merge()
    assert model.state_dict()["0.weight"].tolist() == [[3.0, 4.0], [23.0, 24.0]]


def test_unmerging_gives_the_very_parameters_back() -> None:
    model = net()
    before = dict(model.named_parameters())
    made = lora(model, at=EVERYWHERE)
    made.merge()
    now = dict(model.named_parameters())
    changed = {name for name, p in before.items() if now[name] is not p}
    assert changed == {
        "qkv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "blocks.0.linear1.weight",
        "out.weight",
    }
    made.unmerge()
    now = dict(model.named_parameters())
    assert all(now[name] is p for name, p in before.items())


def test_merging_writes_into_no_tensor_that_was_there() -> None:
    model = net()
    before = [(p, p._version, p.detach().clone()) for p in model.parameters()]
    made = lora(model, at=EVERYWHERE)
    made.merge()
    made.unmerge()
    assert all(p._version == version for p, version, _ in before)
    assert all(torch.equal(p, bits) for p, _, bits in before)


def test_full_tuning_shares_no_memory_with_what_it_merged() -> None:
    model = net()
    made = attach(model, FullFineTuning(), at="out")
    made.merge()
    model.out.weight.data.zero_()
    assert bool(made.adapters["out"].get_parameter("value").any())


def test_only_the_rows_of_the_adapted_parts_move() -> None:
    model = net()
    before = model.qkv.weight.detach().clone()
    lora(model, at="qkv[q,v]").merge()
    moved = (model.qkv.weight != before).any(1)
    assert moved.tolist() == [True] * 8 + [False] * 8 + [True] * 8


def test_a_merged_weight_is_frozen_and_under_the_backbones_own_name() -> None:
    model = net()
    names = list(model.state_dict())
    made = lora(model)
    frozen = model.qkv.weight.detach().clone()
    made.merge()
    assert list(model.state_dict()) == names
    assert not torch.equal(model.state_dict()["qkv.weight"], frozen)
    assert not model.get_parameter("qkv.weight").requires_grad


def test_a_merged_state_dict_is_a_plain_backbone() -> None:
    model = net()
    made = lora(model, at=EVERYWHERE)
    made.merge()
    plain = net()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(INPUT), model(INPUT))


def test_training_mode_has_no_part_in_it() -> None:
    model = net()
    made = lora(model)
    made.merge()
    merged = model(INPUT)
    model.train()
    model.eval()
    assert torch.equal(model(INPUT), merged)
    assert made.backbone is model


def test_the_sets_that_acted_before_act_again() -> None:
    model = net()
    a, b = lora(model, name="a"), lora(model, at="out", name="b")
    switch(model, ["b", "a"])
    both = model(INPUT)
    a.merge()
    a.unmerge()
    assert torch.equal(model(INPUT), both)
    switch(model, None)
    none = model(INPUT)
    b.merge()
    assert not torch.equal(model(INPUT), none)
    b.unmerge()
    assert torch.equal(model(INPUT), none)


def test_a_set_that_left_meanwhile_does_not_come_back() -> None:
    model = net()
    a, b = lora(model, name="a"), lora(model, name="b")
    rest = lora(model, at="out", name="rest")
    switch(model, ["a", "b"])
    a.merge()
    b.detach()
    a.unmerge()
    a.detach()
    rest.detach()
    assert torch.equal(model(INPUT), net()(INPUT))


def test_a_merged_set_can_be_detached() -> None:
    model = net()
    before = dict(model.named_parameters())
    made = lora(model)
    made.merge()
    made.detach()
    assert dict(model.named_parameters()) == before
    assert all(model.get_parameter(name) is p for name, p in before.items())
    assert torch.equal(model(INPUT), net()(INPUT))
    assert line_of(made.merge) == "set 'pets' is detached: attach or load it again"


def test_a_loaded_set_merges_to_the_same_bits(tmp_path: Path) -> None:
    model, other = net(), net()
    made = lora(model, at=EVERYWHERE)
    made.save(tmp_path / "a.safetensors")
    made.merge()
    load(other, tmp_path / "a.safetensors").merge()
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_copy_of_a_merged_backbone_is_unmerged_alone() -> None:
    model = net()
    made = lora(model)
    made.merge()
    twin = copy.deepcopy(model)
    merged = model(INPUT)
    sets_of(twin)["pets"].unmerge()
    assert torch.equal(twin.state_dict()["qkv.weight"], net().qkv.weight)
    assert torch.equal(model(INPUT), merged)


def test_what_was_cast_while_merged_is_unmerged_in_its_new_dtype() -> None:
    model = net()
    made = lora(model)
    made.merge()
    model.double()
    made.unmerge()
    assert {p.dtype for p in model.state_dict().values()} == {torch.float64}
    assert torch.equal(model.state_dict()["qkv.weight"], net().qkv.weight.double())
    assert model(INPUT.double()).dtype == torch.float64


# ---- what is refused


@pytest.mark.parametrize(
    ("recipe", "at", "method"),
    [
        (Bottleneck(rank=2), "blocks.*", "Bottleneck"),
        (Bottleneck(rank=2, placement="parallel"), "out", "Bottleneck"),
        (AdapterTune(rank=2), "blocks.*", "AdapterTune"),
        (MoSA(rank=2, experts=2), "blocks.*", "MoSA"),
    ],
)
def test_a_method_that_acts_on_activations_is_refused_by_name(
    recipe: Recipe, at: str, method: str
) -> None:
    class WithBranch(nn.TransformerEncoderLayer):
        """A block whose MLP branch has a name that we know."""

        def __init__(self) -> None:
            super().__init__(8, 2, 16, batch_first=True)
            self.mlp = nn.Linear(8, 8)

    model = net()
    model.blocks = nn.ModuleList([WithBranch()])
    made = attach(model, recipe, at)
    before = model.state_dict()
    site = made.sites[0].name
    assert line_of(made.merge) == (
        f"{method} acts on activations at {site}: it cannot be merged into weights"
    )
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_set_without_sites_has_nothing_to_merge() -> None:
    made = attach(net(), HeadOnly())
    assert line_of(made.merge) == "HeadOnly has no sites: there is nothing to merge"


def test_a_second_merge_is_refused() -> None:
    model = net()
    a, b = lora(model, name="a"), lora(model, name="b")
    a.merge()
    merged = model(INPUT)
    assert line_of(a.merge) == "set 'a' is merged already: unmerge it first"
    assert line_of(b.merge) == "set 'a' is merged already: unmerge it first"
    assert torch.equal(model(INPUT), merged)


def test_unmerging_what_is_not_merged_is_refused() -> None:
    model = net()
    a, b = lora(model, name="a"), lora(model, name="b")
    assert line_of(a.unmerge) == "set 'a' is not merged"
    a.merge()
    assert line_of(b.unmerge) == "set 'b' is not merged"
    a.unmerge()
    assert line_of(a.unmerge) == "set 'a' is not merged"


@pytest.mark.parametrize("names", [None, "b", ["a", "b"], ["b", "a"]])
def test_no_other_choice_of_sets_while_one_is_merged(names: str | list[str] | None) -> None:
    model = net()
    a, _ = lora(model, name="a"), lora(model, name="b")
    a.merge()
    merged = model(INPUT)

    def act() -> None:
        with activate(model, names):
            model(INPUT)

    wanted = "set 'a' is merged into the weights: unmerge it first"
    assert line_of(act) == wanted
    assert line_of(lambda: switch(model, names)) == wanted
    assert torch.equal(model(INPUT), merged)


@pytest.mark.parametrize("names", [["a", None], [None, None], ["a", "b"]])
def test_no_set_per_sample_while_one_is_merged(names: list[str | None]) -> None:
    model = net()
    a, _ = lora(model, name="a"), lora(model, name="b")
    a.merge()

    def act() -> None:
        with activate(model, per_sample=names):
            model(INPUT)

    assert "is merged into the weights" in line_of(act)


def test_the_merged_set_itself_may_be_activated() -> None:
    model = net()
    made = lora(model)
    made.merge()
    merged = model(INPUT)
    with activate(model, "pets"):
        assert torch.equal(model(INPUT), merged)  # not once more on top
    with activate(model, per_sample=["pets", "pets"]):
        assert torch.equal(model(INPUT), merged)


def test_nothing_is_attached_beside_a_merged_set() -> None:
    model = net()
    lora(model).merge()
    merged = model(INPUT)
    line = line_of(lambda: attach(model, LoRA(rank=2), at="out", name="other"))
    assert line == "a set is merged into the weights: unmerge it before attaching another"
    assert torch.equal(model(INPUT), merged)


def test_a_tied_weight_is_refused_before_it_could_be_merged() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 8), "head": nn.Linear(8, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    assert "head is tied" in line_of(lambda: attach(model, LoRA(rank=2), at="head"))


def test_merging_inside_activate_is_refused_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    made = attach(model, LoRA(rank=2), at="0")
    made.adapters["0"].get_parameter("B").data.fill_(1.0)
    base, x = model.get_parameter("0.weight"), torch.ones(1, 4)
    with activate(model, None):
        before = model(x)
        with pytest.raises(AdaptError, match="promises other weights"):
            made.merge()
        assert torch.equal(model(x), before)
    assert model.get_parameter("0.weight") is base
