"""AdaLoRA at work: where ranks end up, PEFT's choices, resuming, files, the way to a plain LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from polyadapt.core import AdaLoRA, AdaptError, AdapterSet, LoRA, attach, load
from polyadapt.core.errors import StoreError
from polyadapt.core.live_ranks import as_lora, ranks
from polyadapt.tests.adalora_cases import adalora, chain, train

pytestmark = pytest.mark.slow  # whole runs


def test_a_target_equal_to_the_start_prunes_nothing() -> None:
    model = chain()
    made = attach(model, AdaLoRA(rank=3, initial_rank=3, every=1), at="{0,2}")
    train(model, made, range(1, 11), total=10)
    assert ranks(made) == {"0": 3, "2": 3}


def test_a_run_ends_with_exactly_the_budget() -> None:
    model = chain()
    made = attach(model, AdaLoRA(rank=2, initial_rank=4, every=3), at="{0,2}")
    optimiser = train(model, made, range(1, 4), total=30)
    assert sum(ranks(made).values()) == 8
    train(model, made, range(4, 31), 30, optimiser)
    assert sum(ranks(made).values()) == 4


class Two(nn.Module):
    """A loss that depends 100 times more on one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.quiet = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = 100 * self.loud(x).square().mean() + self.quiet(x).square().mean()
        return loss


def test_a_site_with_larger_gradients_ends_with_more_ranks() -> None:
    model = Two()
    made = attach(model, AdaLoRA(rank=3, initial_rank=6, every=1), at="{loud,quiet}")
    optimiser = torch.optim.SGD(made.parameters(), lr=1e-3)
    for step in range(1, 21):
        x = torch.randn(4, 6, generator=Generator().manual_seed(step))
        optimiser.zero_grad()
        model(x).backward()
        optimiser.step()
        made.after_step(step, 20)
    found = ranks(made)
    assert found["loud"] > found["quiet"]
    assert sum(found.values()) == 6


def test_a_pruned_triplet_comes_back_before_the_last_phase_only() -> None:
    model = chain()
    made = attach(model, AdaLoRA(rank=1, initial_rank=4, t_init=1, t_final=4, every=4), at="0")
    (adapter,) = adalora(made)
    optimiser = train(model, made, range(1, 5), total=12)
    assert adapter.rank() < 4  # step 4 made a choice
    train(model, made, range(5, 6), 12, optimiser)
    assert adapter.rank() == 4  # step 5 made none: all have moved off zero
    train(model, made, range(6, 9), 12, optimiser)
    last = adapter.E.detach() != 0
    assert int(last.sum()) == 1
    for step in range(9, 13):
        train(model, made, range(step, step + 1), 12, optimiser)
        assert torch.equal(adapter.E.detach() != 0, last)


def test_the_scale_does_not_follow_the_ranks() -> None:
    model = chain()
    made = attach(model, AdaLoRA(rank=1, initial_rank=4, alpha=8, every=1), at="0")
    train(model, made, range(1, 11), total=10)
    (adapter,) = adalora(made)
    assert (adapter.rank(), adapter.scale) == (1, 2.0)


def test_nothing_is_scored_after_the_last_choice() -> None:
    model = chain()
    made = attach(model, AdaLoRA(rank=1, t_final=3, every=1), at="0")
    optimiser = train(model, made, range(1, 8), total=10)
    kept = {k: t.clone() for k, t in made.state_dict().items()}
    train(model, made, range(8, 11), 10, optimiser)
    now = made.state_dict()
    assert torch.equal(now["0/sensitivity"], kept["0/sensitivity"])
    assert not torch.equal(now["0/A"], kept["0/A"])


# ---- against PEFT


def test_a_run_makes_the_choices_that_peft_makes() -> None:
    from peft import AdaLoraConfig, get_peft_model

    ours, base = chain(), chain()
    recipe = AdaLoRA(
        rank=2, initial_rank=4, alpha=8, t_init=2, t_final=3, every=2, orthogonality=0.5
    )
    made = attach(ours, recipe, at="{0,2}", generator=Generator().manual_seed(5))
    config = AdaLoraConfig(
        target_r=2, init_r=4, lora_alpha=8, tinit=2, tfinal=3, deltaT=2, total_step=12,
        target_modules=["0", "2"],
    )  # fmt: skip
    theirs: Any = get_peft_model(base, config).base_model
    inner = theirs.model
    pairs = [(a, inner[n]) for a, n in zip(adalora(made), (0, 2), strict=True)]
    with torch.no_grad():
        for adapter, layer in pairs:
            layer.lora_A["default"].copy_(adapter.A)
            layer.lora_B["default"].copy_(adapter.B)
    first = torch.optim.SGD(made.parameters(), lr=0.5)
    second = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    for step in range(1, 13):
        x, target = torch.randn(2, 8, 6, generator=Generator().manual_seed(step))
        for model, optimiser in ((ours, first), (inner, second)):
            optimiser.zero_grad()
            (model(x) - target).square().mean().backward()
            optimiser.step()
        made.after_step(step, 12)
        theirs.update_and_allocate(step)
        for adapter, layer in pairs:
            peft_e = layer.lora_E["default"][:, 0]
            assert torch.equal(adapter.E.eq(0), peft_e.eq(0)), step
            torch.testing.assert_close(adapter.E, peft_e, rtol=1e-3, atol=1e-7)
    assert sum(ranks(made).values()) == 4


# ---- what is kept


def test_a_resumed_run_has_the_same_bits() -> None:
    recipe = AdaLoRA(rank=2, initial_rank=4, every=2)
    model, other = chain(), chain()
    made = attach(model, recipe, at="{0,2}")
    optimiser = train(model, made, range(1, 9), total=20)
    state = copy.deepcopy(made.state_dict())
    moments = copy.deepcopy(optimiser.state_dict())
    train(model, made, range(9, 21), 20, optimiser)
    resumed = attach(other, recipe, at="{0,2}", generator=Generator().manual_seed(77))
    resumed.load_state_dict(state)
    again = torch.optim.AdamW(resumed.parameter_groups(0.05))
    again.load_state_dict(moments)
    train(other, resumed, range(9, 21), 20, again)
    assert ranks(resumed) == ranks(made)
    own, wanted = resumed.state_dict(), made.state_dict()
    assert all(torch.equal(own[key], wanted[key]) for key in wanted)


def trained() -> tuple[nn.Module, AdapterSet]:
    model = chain()
    made = attach(model, AdaLoRA(rank=2, initial_rank=4, alpha=8, every=1), at="{0,2}")
    train(model, made, range(1, 11), total=10)
    return model, made


def test_the_file_holds_no_moving_means_and_gives_the_same_bits(tmp_path: Path) -> None:
    model, made = trained()
    made.save(tmp_path / "a.safetensors")
    other, x = chain(), torch.ones(3, 6)
    loaded = load(other, tmp_path / "a.safetensors")
    assert torch.equal(other(x), model(x))
    assert {key.split("/")[1] for key in loaded.state_dict()} == {"A", "B", "E"}
    assert loaded.recipe == made.recipe.replace(allocate=False)
    assert ranks(loaded) == ranks(made)
    loaded.after_step(1, None)  # allocates nothing, so needs nothing
    made.save(tmp_path / "b.safetensors", training_state=True)
    assert load(chain(), tmp_path / "b.safetensors").state_dict().keys() == made.state_dict().keys()


def test_the_live_triplets_are_a_plain_lora() -> None:
    model, made = trained()
    recipe, sites, tensors = as_lora(made)
    found = {site: rank for site, rank in ranks(made).items() if rank}
    assert {s.name: recipe.rank_at(s) for s in sites} == found
    other = chain()
    plain = attach(other, recipe, sites)
    plain.load_state_dict(tensors)
    x = torch.ones(3, 6)
    torch.testing.assert_close(other(x), model(x))
    assert not torch.allclose(model(x), chain()(x), atol=1e-3)
    assert isinstance(plain.recipe, LoRA)


def test_a_dead_site_is_left_out_of_the_plain_lora() -> None:
    model = chain()
    made = attach(model, AdaLoRA(rank=2), at="{0,2}")
    with pytest.raises(AdaptError, match="no live rank"):
        as_lora(made)
    adalora(made)[1].E.data[1] = 3.0
    recipe, sites, tensors = as_lora(made)
    assert [s.name for s in sites] == ["2"]
    assert recipe.rank == len(tensors["2/A"]) == 1


def test_a_site_whose_name_ends_with_another_sites_name_becomes_a_plain_lora() -> None:
    def towers() -> nn.Sequential:
        return nn.Sequential(chain(), nn.Sequential(chain(seed=4)))

    model, other = towers(), towers()
    made = attach(model, AdaLoRA(rank=2), at=["0.0", "1.0.0"])  # r0 = 3
    text, image = adalora(made)
    text.E.data[1], image.E.data[:] = 2.0, torch.tensor([1.0, 2.0, 3.0])
    recipe, sites, tensors = as_lora(made)
    plain = attach(other, recipe, sites)
    plain.load_state_dict(tensors)
    torch.testing.assert_close(other(torch.ones(3, 6)), model(torch.ones(3, 6)))
    assert not tensors["0.0/A"][1:].any()
    assert not tensors["0.0/B"][:, 1:].any()


def test_a_file_of_another_initial_rank_does_not_load(tmp_path: Path) -> None:
    _, made = trained()
    wrong = attach(chain(), AdaLoRA(rank=2, initial_rank=3), at="{0,2}")
    with pytest.raises(AdaptError, match="expected"):
        wrong.load_state_dict(made.state_dict())
    made.recipe = AdaLoRA(rank=2, initial_rank=3)  # the tensors have 4
    made.save(tmp_path / "wrong.safetensors")
    with pytest.raises(StoreError, match=r"\[4, 6\], expected \[3, 6\]"):
        load(chain(), tmp_path / "wrong.safetensors")
