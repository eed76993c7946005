"""MoSA: the checks of its description, on timm's ViT at tiny size."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Generator, Tensor

from polyadapt.core import AdaptError, Bottleneck, MoSA, Recipe, attach
from polyadapt.core.adapters.mosa import Experts, MoSAAdapter, partition, symmetric_kl
from polyadapt.tests.mosa_cases import HERE, adam, built, train, vit, wake


def fix(adapter: MoSAAdapter, i: int, j: int) -> None:
    """From now on the forward draws these experts."""
    adapter.down.draw = lambda: torch.tensor([i])  # type: ignore[method-assign]
    adapter.up.draw = lambda: torch.tensor([j])  # type: ignore[method-assign]


def owned(experts: Experts, i: int) -> Tensor:
    return experts.owner == i


# ---- the start and the partition


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_at_the_start_training_and_evaluation_are_the_backbone_bit_for_bit(share: str) -> None:
    model, image = vit(), torch.randn(2, 3, 16, 16)
    plain = model(image)
    made = attach(model, MoSA(rank=4, share=share))
    assert torch.equal(model.eval()(image), plain)
    assert torch.equal(model.train()(image), plain)
    wake(made)
    assert not torch.equal(model.eval()(image), plain)


@pytest.mark.parametrize(("experts", "sizes"), [(4, {12_288}), (3, {16_384}), (5, {9_830, 9_831})])
def test_the_experts_share_all_entries_once_and_equally(experts: int, sizes: set[int]) -> None:
    owner = partition(torch.zeros(64, 768), experts, "all", None)
    masks = torch.stack([owner == i for i in range(experts)])
    assert bool((masks.sum(0) == 1).all())
    assert {int(mask.sum()) for mask in masks} == sizes


def test_the_generator_decides_the_partition() -> None:
    one, same, other = (
        partition(torch.zeros(8, 16), 4, "all", Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    adapter = built(MoSA(rank=8, share="none"))
    assert not torch.equal(adapter.down.owner, adapter.up.owner.T)


@pytest.mark.parametrize(("mode", "axis"), [("row", 1), ("column", 0)])
def test_rows_and_columns_can_be_shared_each_by_itself(mode: str, axis: int) -> None:
    owner = partition(torch.zeros(8, 12), 4, mode, None)
    assert owner.shape == (8, 12)
    for i in range(4):
        assert set((owner == i).sum(axis).tolist()) == {owner.shape[axis] // 4}


@pytest.mark.parametrize(
    ("rank", "norm", "stored"),
    [
        (64, False, 1_189_632),
        (64, True, 1_208_064),
        (16, False, 304_320),
        (16, True, 322_752),
    ],
)
def test_twelve_blocks_store_what_the_paper_counts(rank: int, norm: bool, stored: int) -> None:
    adapter = built(MoSA(rank=rank, norm=norm), width=768)
    assert 12 * sum(t.numel() for t in adapter.deployed().state_dict().values()) == stored
    more_biases = 3 * 768  # share="down": of four whole biases b, one is stored
    assert 12 * (sum(p.numel() for p in adapter.parameters()) - more_biases) == stored


# ---- one expert is the plain adapter


def test_one_expert_trains_as_adaptformer_does() -> None:
    recipe, frozen = MoSA(rank=4, experts=1), vit()
    plain = Bottleneck(
        rank=4, placement="parallel_ffn", norm=True, scale=0.1, dropout=0.1, down_init="kaiming"
    )
    ends: list[dict[str, Tensor]] = []
    for method in (recipe, plain):
        model = copy.deepcopy(frozen)
        made = attach(model, method, generator=Generator().manual_seed(3))
        torch.manual_seed(4)
        train(model, adam(made, weight_decay=0.1), steps=3)
        deployed = {name: a.deployed().state_dict() for name, a in made.adapters.items()}
        ends.append({f"{s}/{k}": t for s, ts in deployed.items() for k, t in ts.items()})
        ends[-1]["gradient"] = torch.cat([p.grad.flatten() for p in made.parameters()]).sort()[0]  # type: ignore[union-attr]
        ends[-1]["output"] = model(torch.ones(1, 3, 16, 16))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert bool(ends[0]["blocks.0/up"].any())


# ---- training against evaluation


def choices(adapter: MoSAAdapter, x: Tensor, y: Tensor) -> Tensor:
    """The output of every choice of experts, without dropout."""
    outputs = []
    for i in range(adapter.down.number):
        for j in range(adapter.up.number):
            fix(adapter, i, j)
            outputs.append(adapter.train().output(x, y, HERE))
    return torch.stack(outputs)


def gap_to_the_mean_of_all_choices(share: str) -> float:
    adapter = built(MoSA(rank=8, experts=3, share=share, dropout=0.0, scale=1.0))
    wake(adapter)
    x, y = torch.randn(5, 16), torch.randn(5, 16)
    every = choices(adapter, x, y)
    assert (every[0] - every[-1]).abs().max() > 0.1  # the experts do differ
    return (every.mean(0) - adapter.eval().output(x, y, HERE)).abs().max().item()


def test_with_a_shared_down_projection_evaluation_is_the_mean_of_all_choices() -> None:
    assert gap_to_the_mean_of_all_choices("down") < 1e-6


@pytest.mark.parametrize("share", ["up", "none"])
def test_with_a_split_down_projection_it_is_not(share: str) -> None:
    assert gap_to_the_mean_of_all_choices(share) > 0.01  # the GELU stands between


@pytest.mark.parametrize("inactive", ["init", "zero"])
def test_after_training_entries_outside_an_experts_share_are_as_at_the_start(
    inactive: str,
) -> None:
    model = vit()
    made = attach(model, MoSA(rank=4, experts=2, share="none", inactive=inactive))
    adapter = made.adapters["blocks.0"]
    assert isinstance(adapter, MoSAAdapter)
    start = adapter.down.weight.detach().clone()
    train(model, adam(made), steps=8)
    for i in range(2):
        index = torch.tensor([i])
        down, up = adapter.down.expert(index)[0], adapter.up.expert(index)[0]
        outside = ~owned(adapter.down, i)
        wanted = start[outside] if inactive == "init" else torch.zeros(int(outside.sum()))
        assert torch.equal(down[outside], wanted)
        assert not torch.equal(down[~outside], start[~outside])
        assert not up[~owned(adapter.up, i)].any()
        assert up[owned(adapter.up, i)].any()


def test_the_merged_up_projection_is_the_owned_values_divided_by_the_number() -> None:
    model = vit()
    made = attach(model, MoSA(rank=4, experts=4))
    train(model, adam(made), steps=8)
    adapter = made.adapters["blocks.1"]
    assert isinstance(adapter, MoSAAdapter)
    weights = [adapter.up.expert(torch.tensor([j]))[0] for j in range(4)]
    union = torch.stack(weights).sum(0)
    merged = adapter.deployed().get_parameter("up")
    assert torch.equal(merged, union / 4)
    assert not torch.allclose(merged, union)


def test_the_merged_down_projection_is_its_start_plus_a_share_of_what_was_learned() -> None:
    experts = built(MoSA(rank=4, experts=4, share="up")).down
    start = experts.weight.detach().clone()
    with torch.no_grad():
        experts.weight.add_(torch.randn(4, 16))
    weights = [experts.expert(torch.tensor([i]))[0] for i in range(4)]
    torch.testing.assert_close(experts.mean()[0], torch.stack(weights).mean(0))
    torch.testing.assert_close(experts.mean()[0], start + (experts.weight - start) / 4)


def test_the_merged_biases_are_the_mean_of_the_experts() -> None:
    adapter = built(MoSA(rank=2, experts=2), width=2)
    with torch.no_grad():
        adapter.up.bias.copy_(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert adapter.deployed().get_parameter("up_bias").tolist() == [2.0, 4.0]
    assert adapter.up.expert(torch.tensor([1]))[1].tolist() == [3.0, 6.0]


# ---- which experts move


def test_experts_that_are_not_drawn_get_no_gradient() -> None:
    adapter = built(MoSA(rank=4, experts=2, share="none", dropout=0.0))
    wake(adapter)
    fix(adapter, 0, 1)
    x, y = torch.randn(5, 16), torch.randn(5, 16)
    adapter.train().output(x, y, HERE).square().sum().backward()
    for experts, drawn in ((adapter.down, 0), (adapter.up, 1)):
        gradient, bias = experts.weight.grad, experts.bias.grad
        assert gradient is not None
        assert bias is not None
        assert torch.equal(gradient != 0, owned(experts, drawn))
        assert bias[drawn].any()
        assert not bias[1 - drawn].any()


def test_weight_decay_does_not_move_experts_that_are_not_drawn() -> None:
    model = vit()
    made = attach(model, MoSA(rank=4, experts=2, share="none"))
    wake(made)
    adapter = made.adapters["blocks.0"]
    assert isinstance(adapter, MoSAAdapter)
    fix(adapter, 0, 1)
    before = {name: t.clone() for name, t in adapter.state_dict().items()}
    train(model, adam(made, weight_decay=0.5), steps=4)
    for name, experts, drawn in (("down", adapter.down, 0), ("up", adapter.up, 1)):
        still = experts.weight == before[f"{name}.weight"]
        assert torch.equal(still, ~owned(experts, drawn))
        assert torch.equal(experts.bias[1 - drawn], before[f"{name}.bias"][1 - drawn])


def test_an_expert_drawn_before_rests_while_another_is_drawn() -> None:
    model = vit()
    made = attach(model, MoSA(rank=4, experts=2, share="none"))
    wake(made)
    adapter = made.adapters["blocks.0"]
    assert isinstance(adapter, MoSAAdapter)
    sgd = torch.optim.SGD(made.parameter_groups(lr=0.1, weight_decay=0.5))
    fix(adapter, 0, 0)
    train(model, sgd, steps=1)
    before = adapter.up.weight.detach().clone()
    fix(adapter, 1, 1)
    train(model, sgd, steps=1)
    assert torch.equal(adapter.up.weight == before, owned(adapter.up, 0))


def test_only_dense_matrices_decay() -> None:
    made = attach(vit(), MoSA(rank=4, experts=2, share="down"))
    decaying, still = made.parameter_groups(lr=0.1, weight_decay=0.5)
    shared = [a.get_parameter("down.weight") for a in made.adapters.values()]
    assert {id(p) for p in decaying["params"]} == {id(p) for p in shared}
    assert (decaying["weight_decay"], still["weight_decay"]) == (0.5, 0.0)
    assert decaying["lr"] == still["lr"] == 0.1
    assert len(decaying["params"]) + len(still["params"]) == len(list(made.parameters()))


# ---- the two-forward loss


def test_the_symmetric_divergence_by_hand() -> None:
    z1 = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    z2 = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    loss = symmetric_kl(z1, z2)
    loss.backward()
    assert loss.item() == pytest.approx(0.46211716, abs=1e-8)
    assert z1.grad is not None
    assert z1.grad.tolist() == pytest.approx([0.2310586, -0.2310586], abs=1e-7)
    assert z2.grad is not None
    assert z2.grad.tolist() == pytest.approx([-0.2310586, 0.2310586], abs=1e-7)


def test_the_symmetric_divergence_of_equal_logits_is_zero() -> None:
    z = torch.randn(4, 5)
    assert symmetric_kl(z, z.clone()).item() == 0


def test_the_symmetric_divergence_is_a_mean_over_the_batch() -> None:
    z1, z2 = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    loss = symmetric_kl(z1, z2)
    one_by_one = [symmetric_kl(z1[k], z2[k]) for k in range(3)]
    torch.testing.assert_close(loss, torch.stack(one_by_one).mean())
    loss.backward()
    expected = (z1.softmax(-1) - z2.softmax(-1)) / (2 * 3)
    torch.testing.assert_close(z1.grad, expected.detach())


# ---- settings


def test_the_settings_survive_json() -> None:
    recipe = MoSA(rank=16, experts=2, share="none", partition="row", inactive="zero", norm=False)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.consistency == 1.0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rank": 0}, "rank 0 is not allowed"),
        ({"experts": 0}, "experts=0 is not allowed: a whole number from 1 to 255"),
        ({"experts": 256}, "experts=256 is not allowed"),
        ({"experts": 2.0}, "experts=2.0 is not allowed"),
        ({"share": "both"}, "share='both' is not allowed: one of down, up, none"),
        ({"partition": "rows"}, "partition='rows' is not allowed"),
        ({"inactive": "last"}, "inactive='last' is not allowed"),
        ({"scale": math.nan}, "scale=nan is not allowed"),
        ({"dropout": 1}, "dropout=1 is not allowed"),
        ({"consistency": -1.0}, "consistency=-1.0 is below 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(AdaptError, match=f"MoSA: {told}"):
        MoSA(**settings)


def test_more_experts_than_entries_are_refused() -> None:
    with pytest.raises(AdaptError, match=r"5 experts cannot share 4 entries \(partition='row'\)"):
        attach(vit(), MoSA(rank=4, experts=5, partition="row"))
