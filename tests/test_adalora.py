"""AdaLoRA: the triplets, their scores, the budget, who survives, and what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from polyadapt.core import AdaLoRA, AdaptError, Recipe, attach, select
from polyadapt.core.adapters.adalora import AdaLoRAAdapter, Budget, keep_best
from polyadapt.core.adapters.lora import LoRAAdapter, Pair
from polyadapt.core.live_ranks import as_lora
from polyadapt.tests.adalora_cases import adalora, chain
from polyadapt.tests.factor_cases import layers, site_at, stir


def built(model: nn.Module, recipe: AdaLoRA) -> AdaLoRAAdapter:
    site, layer = site_at(model, "0")
    adapter = recipe.build(site, layer.matrix().detach(), Generator().manual_seed(0))
    assert isinstance(adapter, AdaLoRAAdapter)
    return adapter


def small(rank: int = 1, d_in: int = 2, d_out: int = 2) -> AdaLoRAAdapter:
    """An adapter of zeros."""
    pair = Pair(torch.zeros(rank, d_in), torch.zeros(d_out, rank), 1.0, 0.0, False)
    return AdaLoRAAdapter(pair, scored=True)


# ---- the triplets


@pytest.mark.parametrize(("model", "x"), layers())
def test_a_new_adapter_changes_no_bit(model: nn.Module, x: Tensor) -> None:
    adapter, (_, layer) = built(model, AdaLoRA(rank=2)), site_at(model, "0")
    y = model(x)
    assert torch.equal(adapter.output(x, y, layer), y)
    assert torch.equal(adapter.weight(layer.matrix()), layer.matrix())


def test_only_e_has_a_gradient_at_first() -> None:
    model = chain()
    made = attach(model, AdaLoRA(rank=2), at="{0,2}")
    model(torch.ones(1, 6)).square().sum().backward()
    for adapter in adalora(made):
        assert adapter.E.grad is not None
        assert bool(adapter.E.grad.all())
        for factor in (adapter.A, adapter.B):
            assert factor.grad is not None
            assert not bool(factor.grad.any())


def test_the_factors_start_normal_with_deviation_0_02() -> None:
    model = nn.Sequential(nn.Linear(400, 300))
    adapter = built(model, AdaLoRA(rank=40, initial_rank=60))
    assert adapter.A.shape == (60, 400)
    assert adapter.B.shape == (300, 60)
    for factor in (adapter.A, adapter.B):
        assert float(factor.detach().std()) == pytest.approx(0.02, rel=0.02)


def test_the_update_is_scale_times_b_e_a() -> None:
    adapter = small()
    adapter.scale = 2.0
    for tensor, values in (
        (adapter.A, [[1.0, 2.0]]),
        (adapter.B, [[3.0], [4.0]]),
        (adapter.E, [5]),
    ):
        tensor.data = torch.tensor(values, dtype=torch.float32)
    assert adapter.weight(torch.ones(2, 2)).tolist() == [[31.0, 61.0], [41.0, 81.0]]
    assert adapter.factors() == (adapter.A, adapter.B, adapter.E, 2.0)


@pytest.mark.parametrize(("model", "x"), layers())
def test_with_e_of_one_it_is_lora_of_scale_alpha_over_r0(model: nn.Module, x: Tensor) -> None:
    recipe = AdaLoRA(rank=2, alpha=12)
    adapter, (_, layer) = built(model, recipe), site_at(model, "0")
    stir(adapter)
    adapter.E.data.fill_(1.0)
    lora = LoRAAdapter(Pair(adapter.A.data, adapter.B.data, 12 / 3, 0.0, False))
    y = model(x)
    assert torch.equal(adapter.output(x, y, layer), lora.output(x, y, layer))
    assert torch.equal(adapter.weight(layer.matrix()), lora.weight(layer.matrix()))


def test_counts_are_the_cards() -> None:
    model = nn.Sequential(nn.Linear(768, 768, device="meta"))
    made = attach(model.to_empty(device="cpu"), AdaLoRA(rank=8, initial_rank=12), at="0")
    assert 144 * made.trainable_count() == 2_655_936
    assert 144 * 8 * (768 + 768 + 1) == 1_770_624  # what 8 live triplets per site hold
    for adapter in adalora(made):
        adapter.E.data[:8] = 1.0
    assert sum(t.numel() for t in as_lora(made)[2].values()) == 8 * (768 + 768)


# ---- the penalty


def test_the_penalty_is_zero_for_orthonormal_factors_only() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    made = attach(model, AdaLoRA(rank=2, initial_rank=2), at="0")
    (adapter,) = adalora(made)
    adapter.A.data, adapter.B.data = torch.eye(2), torch.eye(2).flip(0)
    assert made.penalty().item() == 0.0
    adapter.A.data = torch.tensor([[1.0, 2.0], [0.0, 1.0]])  # A A^T - I = [[4, 2], [2, 0]]
    assert adapter.departures()[0].item() == pytest.approx(24**0.5)
    assert made.penalty().item() == pytest.approx(0.1 * 24**0.5 / 2)  # the mean of A's and B's


def test_the_papers_penalty_is_a_sum_of_squares() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    made = attach(model, AdaLoRA(rank=2, initial_rank=2, orthogonality=0.5, squared=True), at="0")
    (adapter,) = adalora(made)
    adapter.A.data, adapter.B.data = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.eye(2)
    assert made.penalty().item() == pytest.approx(12.0)


def test_the_penalty_pulls_the_factors_towards_orthonormal_ones() -> None:
    model = chain()
    made = attach(model, AdaLoRA(rank=2, initial_rank=3), at="{0,2}")
    optimiser = torch.optim.Adam(made.parameters(), lr=0.02)
    before = made.penalty().item()
    for _ in range(200):
        optimiser.zero_grad()
        made.penalty().backward()
        optimiser.step()
    assert before == pytest.approx(0.1 * 3**0.5, rel=0.01)  # factors near 0: sqrt(r0) each
    assert made.penalty().item() < before / 10


# ---- scores


def test_the_moving_means_by_hand() -> None:
    adapter = small()
    for parameter in adapter.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.ones_like(parameter)
    for mean, spread, score in ((0.15, 0.1275, 0.019125), (0.2775, 0.21675, 0.0601481)):
        adapter.observe(0.85, 0.85)
        assert adapter.sensitivity is not None
        assert adapter.uncertainty is not None
        assert torch.allclose(adapter.sensitivity, torch.full((1, 5), mean))
        assert torch.allclose(adapter.uncertainty, torch.full((1, 5), spread))
        # E counts whole, the numbers of A and of B by their mean: three times one score
        assert adapter.scores().item() == pytest.approx(3 * score, rel=1e-5)


def test_a_score_takes_means_so_that_wide_layers_have_no_advantage() -> None:
    adapter = small(d_in=3, d_out=2)
    adapter.uncertainty = torch.ones(1, 6)
    adapter.sensitivity = torch.tensor([[1.0, 2.0, 6.0, 10.0, 100.0, 300.0]])  # A | E | B
    assert adapter.scores().item() == 3.0 + 10.0 + 200.0


# ---- the budget


def test_the_budget_of_the_card() -> None:
    recipe = AdaLoRA(rank=8, initial_rank=12, t_init=10, t_final=20)
    budget = recipe.budget(sites=2, total=100)
    assert budget == Budget(24, 16, 10, 80)
    assert [budget.at(step) for step in (10, 20, 50, 80)] == [24, 21, 16, 16]
    every = [budget.at(step) for step in range(1, 101)]
    assert every == sorted(every, reverse=True)


def test_the_budget_of_the_baselines_card() -> None:
    budget = AdaLoRA(rank=8, initial_rank=12, t_init=0, t_final=0).budget(sites=1, total=10)
    assert (budget.at(1), budget.at(5), budget.at(10)) == (10, 8, 8)


def test_shares_of_a_run_become_steps() -> None:
    budget = AdaLoRA(t_init=0.1, t_final=0.3).budget(sites=3, total=200)
    assert budget == Budget(36, 24, 20, 140)


def test_the_budget_is_exact_for_numbers_that_floats_cannot_hold() -> None:
    budget = Budget(2**60 + 1, 1, 0, 2)
    assert budget.at(1) == 1 + 2**57


# ---- who survives


def scored(values: list[list[float]]) -> list[AdaLoRAAdapter]:
    adapters = [small(rank=len(own)) for own in values]
    for adapter, own in zip(adapters, values, strict=True):
        adapter.E.data.fill_(1.0)
        adapter.uncertainty = torch.ones(len(own), 5)
        adapter.sensitivity = torch.zeros(len(own), 5)
        adapter.sensitivity[:, 2] = torch.tensor(own)
    return adapters


def living(adapters: list[AdaLoRAAdapter]) -> list[list[float]]:
    return [adapter.E.tolist() for adapter in adapters]


def test_the_choice_is_global_and_a_site_may_lose_all() -> None:
    adapters = scored([[5.0, 9.0], [1.0, 2.0], [8.0, 3.0]])
    keep_best(adapters, 3)
    assert living(adapters) == [[1, 1], [0, 0], [1, 0]]
    assert [adapter.rank() for adapter in adapters] == [2, 0, 1]


def test_equal_scores_never_prune_below_the_budget() -> None:
    adapters = scored([[0.0, 0.0], [0.0, 0.0]])
    keep_best(adapters, 3)
    assert living(adapters) == [[1, 1], [1, 0]]  # the first of equals stay


def test_a_full_budget_prunes_nothing() -> None:
    adapters = scored([[0.0, 1.0]])
    keep_best(adapters, 2)
    assert living(adapters) == [[1, 1]]


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0 is not allowed"),
        ({"rank": 4, "initial_rank": 3}, "initial_rank=3 is below rank=4"),
        ({"alpha": 0}, "alpha=0 is not allowed"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
        ({"beta1": 1.0}, r"beta1=1.0 is not in \[0, 1\)"),
        ({"beta2": -0.1}, r"beta2=-0.1 is not in \[0, 1\)"),
        ({"orthogonality": -1.0}, r"orthogonality=-1.0 is below 0"),
        ({"t_init": 1.5}, "t_init=1.5 is not allowed: a whole number of steps, or a share"),
        ({"t_final": -1}, "t_final=-1 is not allowed"),
        ({"every": 0}, "every=0 is not allowed"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdaptError, match=message):
        AdaLoRA(**settings)


def test_an_initial_rank_that_does_not_fit_is_refused() -> None:
    with pytest.raises(AdaptError, match="rank 7 does not fit 0: its weight is \\[6, 6\\]"):
        attach(chain(), AdaLoRA(rank=5, initial_rank=7), at="0")


def test_dropout_needs_a_layer_that_is_called() -> None:
    model = chain()
    with pytest.raises(AdaptError, match=r"dropout=0\.5 cannot act on 0"):
        attach(model, AdaLoRA(rank=2, dropout=0.5), at=select(model, "0", slot="weight"))


def test_a_step_without_a_total_or_gradients_is_refused() -> None:
    model = chain()
    made = attach(model, AdaLoRA(rank=2), at="0")
    with pytest.raises(AdaptError, match="AdaLoRA needs the number of steps"):
        made.after_step(1)
    with pytest.raises(AdaptError, match="no gradients at step 1: call after_step before zero_g"):
        made.after_step(1, 10)


def test_a_run_without_a_middle_phase_is_refused() -> None:
    model = chain()
    made = attach(model, AdaLoRA(rank=2, t_init=4, t_final=6), at="0")
    with pytest.raises(AdaptError, match="t_init=4 and t_final=6 leave none of 10 steps"):
        made.after_step(1, 10)


def test_settings_survive_json() -> None:
    recipe = AdaLoRA(rank=4, t_init=100, t_final=0.25)
    assert Recipe.from_json(recipe.to_json()) == recipe
