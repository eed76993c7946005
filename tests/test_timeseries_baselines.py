"""The forecasters that One-for-All is compared with, by hand and by their published counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polyadapt.core import LoRA
from polyadapt.core.errors import AdaptError
from polyadapt.timeseries.adapters import code
from polyadapt.timeseries.backbones import GPT2, NoLanguageModel
from polyadapt.timeseries.baselines import DLinear, LastValue, PatchTST, SeasonalNaive
from polyadapt.timeseries.methods import METHODS, Forecaster, Given, method_called, nearest_rank
from polyadapt.timeseries.patches import Patches

SMALL = {"n_embd": 8, "n_head": 2, "n_positions": 32, "vocab_size": 1}


def given(**changes: Any) -> Given:
    settings: dict[str, Any] = {
        "look_back": 48,
        "horizon": 6,
        "period": 24,
        "seed": 3,
        "backbone": GPT2(blocks=2, pretrained=False, options=SMALL),
        "patches": Patches(16, 8),
        "adapter": LoRA(rank=2, scaling="rank_stabilised", init="gaussian"),
    }
    return Given(**settings | changes)


def count(name: str, **changes: Any) -> int:
    return sum(p.numel() for p in METHODS[name].build(given(**changes)).trained())


# Without learning


def test_the_last_value_goes_on_in_every_channel() -> None:
    past = torch.tensor([[[1.0, 10.0], [2.0, 20.0]]])
    assert LastValue(2)(past).tolist() == [[[2.0, 20.0], [2.0, 20.0]]]


def test_the_seasonal_naive_repeats_the_last_season() -> None:
    past = torch.tensor([9.0, 1.0, 2.0, 3.0]).view(1, 4, 1)
    assert SeasonalNaive(5, period=3)(past).flatten().tolist() == [1, 2, 3, 1, 2]
    assert SeasonalNaive(2, period=1)(past).flatten().tolist() == [3, 3]


def test_a_past_shorter_than_a_season_is_refused() -> None:
    with pytest.raises(AdaptError, match="a past of 4 rows is shorter than a season of 24"):
        SeasonalNaive(2, period=24)(torch.zeros(1, 4, 1))


# DLinear


def test_the_trend_of_dlinear_repeats_the_ends() -> None:
    model = DLinear(look_back=3, horizon=1, kernel=3)
    assert model.trend(torch.tensor([0.0, 3.0, 6.0]).view(1, 3, 1)).flatten().tolist() == [1, 3, 5]


def test_dlinear_starts_at_the_mean_of_the_past() -> None:
    model = DLinear(look_back=48, horizon=4)
    past = torch.randn(3, 48, 2, generator=torch.Generator().manual_seed(0))
    biases = (model.of_trend.bias + model.of_rest.bias)[None, :, None]
    torch.testing.assert_close(model(past), past.mean(1, keepdim=True) + biases)


def test_dlinear_maps_trend_and_rest_apart_and_all_channels_alike() -> None:
    model = DLinear(look_back=3, horizon=1, kernel=3)
    with torch.no_grad():
        model.of_trend.weight.copy_(torch.tensor([[0.0, 0.0, 1.0]]))  # trend 1, 3, 5: 5
        model.of_rest.weight.copy_(torch.tensor([[1.0, 0.0, 0.0]]))  # rest -1, 0, 1: -1
        model.of_trend.bias.fill_(0.5)
        model.of_rest.bias.fill_(0.0)
    past = torch.tensor([0.0, 3.0, 6.0])
    assert model(torch.stack([past, 2 * past], -1)[None]).flatten().tolist() == [4.5, 8.5]


def test_dlinear_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in DLinear(336, 96).parameters()) == 2 * 96 * 337


def test_a_moving_average_without_a_middle_is_refused() -> None:
    with pytest.raises(AdaptError, match="kernel=24 is not allowed: an odd number"):
        DLinear(48, 4, kernel=24)


# PatchTST


def test_patchtst_forecasts_each_channel_as_if_alone() -> None:
    torch.manual_seed(0)
    model = PatchTST(look_back=40, horizon=5).eval()
    past = torch.randn(2, 40, 3)
    with torch.no_grad():
        whole, alone = model(past), model(past[:, :, 1:2])
    assert whole.shape == (2, 5, 3)
    torch.testing.assert_close(whole[:, :, 1:2], alone)


def test_patchtst_follows_the_scale_of_its_window() -> None:
    torch.manual_seed(0)
    model = PatchTST(look_back=40, horizon=5).eval()
    past = torch.randn(2, 40, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(3 * past + 7), 3 * model(past) + 7, rtol=1e-3, atol=1e-3)


def test_patchtst_has_the_size_of_the_authors_script() -> None:
    config = PatchTST(look_back=336, horizon=96).model.config
    assert (config.d_model, config.num_hidden_layers, config.ffn_dim) == (16, 3, 128)
    assert PatchTST(336, 96).model.model.patchifier.num_patches == 41
    with pytest.raises(AdaptError, match="look_back=1 is not allowed"):
        PatchTST(1, 4)


# Networks


@pytest.mark.parametrize(
    ("look_back", "horizon", "parameters"),
    [
        (336, 96, 3_916_128),
        (336, 192, 7_012_800),
        (336, 336, 11_657_808),
        (336, 720, 24_044_496),
        (512, 96, 5_538_144),
        (512, 720, 36_209_616),
    ],
)
def test_gpt4ts_trains_the_published_number(look_back: int, horizon: int, parameters: int) -> None:
    gpt2 = GPT2(pretrained=False, options={"vocab_size": 1})
    with torch.device("meta"):
        assert count("gpt4ts", look_back=look_back, horizon=horizon, backbone=gpt2) == parameters


@pytest.mark.parametrize(("horizon", "parameters"), [(96, 546_304), (720, 556_288)])
def test_one_for_all_trains_the_published_number(horizon: int, parameters: int) -> None:
    gpt2 = GPT2(pretrained=False, options={"vocab_size": 1})
    with torch.device("meta"):
        settings = given(look_back=336, horizon=horizon, backbone=gpt2, adapter=code().recipe)
        candidate = METHODS["one-for-all"].build(settings)
    assert sum(p.numel() for p in candidate.trained()) == parameters
    dense = candidate.left_out()[:4]
    assert sum(t.numel() for t in dense) == 13_056 + horizon * (42 * 768 + 1)


def test_gpt4ts_trains_norms_positions_and_the_dense_layers_only() -> None:
    model = METHODS["gpt4ts"].build(given()).model
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 2 * 8  # attention and MLP: four layers with a bias, in two blocks
    assert all(".attn." in name or ".mlp." in name for name in frozen)


def test_what_stands_in_for_the_language_model_trains_as_much() -> None:
    expected = 2 * (32 + 8) + 2 * (6 * 8 + 6)
    for name in ("one-for-all", "random-weights", "no-language-model", "one-attention"):
        assert count(name) == expected, name


def test_random_weights_are_other_weights_and_follow_the_seed() -> None:
    def table(name: str, **changes: Any) -> torch.Tensor:
        model = METHODS[name].build(given(**changes)).model
        assert isinstance(model, Forecaster)
        found = model.network.blocks.state_dict()["model.wpe.weight"]
        assert isinstance(found, torch.Tensor)
        return found

    assert not torch.equal(table("random-weights"), table("one-for-all"))
    assert not torch.equal(table("random-weights"), table("random-weights", seed=4))
    assert torch.equal(table("random-weights"), table("random-weights"))


def test_without_weights_to_do_without_random_weights_are_refused() -> None:
    with pytest.raises(AdaptError, match="has no pretrained weights to do without"):
        METHODS["random-weights"].build(given(backbone=NoLanguageModel(width=8)))


def test_lora_has_the_rank_whose_count_is_nearest() -> None:
    per_rank = 2 * (8 + 24 + 8 + 8 + 8 + 32 + 32 + 8) + (48 + 6)  # two blocks, output layer
    budget = 2 * (32 + 8) + 2 * (6 * 8 + 6)
    assert count("lora") == nearest_rank(budget, per_rank) * per_rank
    assert nearest_rank(1550, 1000) == 2
    assert nearest_rank(1, 1000) == 1


def test_full_fine_tuning_leaves_nothing_frozen() -> None:
    candidate = METHODS["full"].build(given())
    assert all(p.requires_grad for p in candidate.model.parameters())
    assert candidate.left_out() == []


def test_what_was_drawn_counts_where_it_stays_frozen() -> None:
    dense = 8 * 16 + 8 + 6 * 48 + 6
    bare = METHODS["no-language-model"].build(given())
    assert sum(t.numel() for t in bare.left_out()) == dense + 32 * 8
    assert METHODS["gpt4ts"].build(given()).left_out() != []  # random blocks: attention and MLP
    assert METHODS["dlinear"].build(given()).left_out() == []


def test_a_fresh_set_changes_no_forecast() -> None:
    past = torch.randn(2, 48, 1, generator=torch.Generator().manual_seed(0))
    forecasts = [
        METHODS[name].build(given()).model.eval()(past) for name in ("one-for-all", "full")
    ]
    torch.testing.assert_close(*forecasts)


# Names


def test_a_method_takes_another_learning_rate() -> None:
    assert method_called("dlinear:0.5").lr == 0.5
    assert not method_called("last-value").learns


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("magic", "unknown method 'magic'; there are last-value"),
        ("dlinear:fast", "'dlinear:fast': the learning rate of a method that learns, above 0"),
        ("dlinear:-1", "above 0"),
        ("last-value:1", "of a method that learns"),
    ],
)
def test_an_unknown_method_or_rate_is_refused_in_one_line(word: str, told: str) -> None:
    with pytest.raises(AdaptError, match=told) as caught:
        method_called(word)
    assert "\n" not in str(caught.value)
