"""The frozen network: windows, patches, the two sites, and what the method's card says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polyadapt.core import AdapterSet, attach
from polyadapt.core.errors import AdaptError, StoreError
from polyadapt.tests.series_cases import SIZES, factors, stir, tiny_task
from polyadapt.timeseries.adapters import Published, code, paper
from polyadapt.timeseries.backbones import GPT2, NoLanguageModel
from polyadapt.timeseries.description import load_set
from polyadapt.timeseries.network import Network, digest
from polyadapt.timeseries.normalisation import normalise
from polyadapt.timeseries.patches import Patches


def network(look_back: int = 336, width: int = 768, seed: int = 0, outputs: int = 96) -> Network:
    """The published shape without the blocks: sizes and gradients of the sites are the same."""
    blocks = NoLanguageModel(width=width).build()
    return Network(blocks, look_back, Patches(16, 8), outputs=outputs, seed=seed).eval()


def gpt2(look_back: int = 336, outputs: int = 8) -> Network:
    """transformers' own class at width 16, in training mode but without dropout."""
    blocks = GPT2(pretrained=False, blocks=2, options=SIZES).build()
    blocks.set_dropout(0)
    return Network(blocks, look_back, Patches(16, 8), outputs=outputs)


def adapted(model: Network, published: Published | None = None, rank: int = 16) -> AdapterSet:
    recipe = (published or code(rank)).recipe
    return attach(model, recipe, model.sites)


@pytest.mark.parametrize(
    ("look_back", "patches", "count"),
    [(336, Patches(16, 8), 42), (512, Patches(16, 16), 33), (104, Patches(24, 2), 42)],
)
def test_a_window_has_as_many_patches_as_published(
    look_back: int, patches: Patches, count: int
) -> None:
    z = torch.arange(look_back, dtype=torch.float32).view(1, -1, 1)
    cut = patches.cut(z)
    assert cut.shape == (1, count, patches.length)
    assert patches.count(look_back) == count
    assert cut[0, 1, 0] == patches.stride
    assert cut[0, -1, -1] == look_back - 1  # the last value, or a copy of it


def test_channels_of_a_step_lie_side_by_side_in_a_joint_patch() -> None:
    z = torch.tensor([[0.0, 10], [1, 11], [2, 12], [3, 13]]).unsqueeze(0)
    expected = [[0.0, 10, 1, 11], [2, 12, 3, 13], [3, 13, 3, 13]]
    assert Patches(2, 2).cut(z)[0].tolist() == expected


@pytest.mark.parametrize(
    ("length", "stride", "message"),
    [
        (0, 1, "length=0 is not allowed"),
        (4, 0, "stride=0 is not allowed"),
        (4, 8, "stride=8 would leave out steps between patches of 4"),
    ],
)
def test_patches_that_cannot_be_cut_are_refused(length: int, stride: int, message: str) -> None:
    with pytest.raises(AdaptError, match=message):
        Patches(length, stride)


def test_a_window_shorter_than_a_patch_or_with_too_many_patches_is_refused() -> None:
    with pytest.raises(AdaptError, match="a window of 8 steps is shorter than a patch of 16"):
        network(look_back=8)
    blocks = NoLanguageModel(width=4, positions=5).build()
    with pytest.raises(AdaptError, match="makes 42 patches, the blocks have 5 positions"):
        Network(blocks, 336, Patches(16, 8), outputs=2)


def test_a_window_of_another_size_is_refused() -> None:
    with pytest.raises(AdaptError, match=r"windows \[b, 336, 1\], got \[2, 335, 1\]"):
        network(width=4)(torch.zeros(2, 335, 1))


def test_normalisation_uses_the_biased_variance_and_leaves_out_what_is_not_observed() -> None:
    x = torch.tensor([2.0, 4.0, float("nan"), 6.0]).view(1, 4, 1)
    z, mean, std = normalise(x, ~x.isnan())
    assert mean.item() == 4
    assert std.item() == pytest.approx((8 / 3 + 1e-5) ** 0.5)
    assert z.flatten().tolist() == pytest.approx([-1.224742, 0, 0, 1.224742], abs=1e-5)
    nothing = normalise(x, torch.zeros_like(x, dtype=torch.bool))
    assert not nothing[0].any()
    assert nothing[1].item() == 0


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e6])
def test_a_constant_window_predicts_itself_and_a_small_share_of_the_heads_output(
    value: float,
) -> None:
    model = network(width=8)
    flat = torch.full((1, 336, 1), value, dtype=torch.float64)
    model.double()
    head = model._outputs(torch.zeros_like(flat))
    expected = value + 0.0031622776 * head
    torch.testing.assert_close(model(flat), expected, atol=1e-9, rtol=1e-9)
    assert model.float()(flat.float()).isfinite().all()


@pytest.mark.parametrize(("a", "b"), [(1.0, 5.0), (3.0, -40.0), (0.5, 1000.0)])
def test_a_scaled_and_shifted_window_gives_a_scaled_and_shifted_forecast(
    a: float, b: float
) -> None:
    model = gpt2().double().eval()
    adapters = adapted(model, rank=4)
    stir(adapters)
    adapters.double()
    x = torch.randn(3, 336, 1, dtype=torch.float64)
    torch.testing.assert_close(model(a * x + b), a * model(x) + b, atol=1e-3, rtol=1e-5)


def test_two_fresh_pairs_change_nothing_and_merging_keeps_what_was_learned() -> None:
    model = gpt2().eval()
    x = torch.randn(3, 336, 1)
    frozen = model(x)
    adapters = adapted(model, rank=4)
    assert torch.equal(model(x), frozen)
    stir(adapters)
    apart = model(x)
    assert (apart - frozen).abs().max() > 0.1
    adapters.merge()
    torch.testing.assert_close(model(x), apart, atol=1e-5, rtol=0)


def test_four_tensors_of_the_published_sizes_are_trained() -> None:
    adapters = adapted(network())
    trained = [list(p.shape) for p in adapters.backbone.parameters() if p.requires_grad]
    assert trained == [[16, 1024], [768, 16], [16, 32256], [96, 16]]
    assert adapters.trainable_count() == 546_304


@pytest.mark.parametrize(
    ("look_back", "horizon", "rank", "count"),
    [(336, 192, 16, 547_840), (336, 96, 2, 68_288), (512, 96, 16, 816_640)],
)
def test_the_count_of_trained_numbers_is_the_cards(
    look_back: int, horizon: int, rank: int, count: int
) -> None:
    adapters = adapted(network(look_back, outputs=horizon), rank=rank)
    assert adapters.trainable_count() == count
    assert adapters.trainable_count() == adapters.stored_count()


def test_the_scales_are_those_of_the_paper_and_of_its_code() -> None:
    assert paper().recipe.scale_of(16) == 0.25
    assert code().recipe.scale_of(16) == 4
    assert code().recipe.scale_of(64) == code().recipe.scale_of(16) / 2


def test_the_two_recipes_differ_where_the_paper_and_its_code_do() -> None:
    said, done = paper(), code()
    assert (said.patches.stride, done.patches.stride) == (16, 8)
    assert (said.lr, said.schedule) == (1e-3, "constant")
    assert (done.lr, done.schedule, done.cosine_epochs, done.last_lr) == (1e-4, "cosine", 20, 1e-8)
    assert (said.recipe.dropout, done.recipe.dropout) == (0, 0.01)
    assert (said.recipe.init_std, done.recipe.init_std) == (None, 1 / 16)


def test_the_official_start_has_zero_and_normal_factors_swapped_at_the_table() -> None:
    adapters = adapted(network())
    table, head = factors(adapters, "positions"), factors(adapters, "out_layer")
    assert not table.A.any()
    assert table.B.std().item() == pytest.approx(1, rel=0.03)
    assert not head.B.any()
    assert head.A.std().item() == pytest.approx(1 / 16, rel=0.01)


def test_the_first_gradients_reach_one_factor_of_each_pair_and_42_positions() -> None:
    model = gpt2()
    adapters = adapted(model, rank=4)
    model(torch.randn(4, 336, 1)).square().mean().backward()
    table, head = (factors(adapters, site).requires_grad_() for site in ("wpe", "out_layer"))
    grads: list[Tensor] = []
    for tensor in (table.A, table.B, head.A, head.B):
        assert tensor.grad is not None
        grads.append(tensor.grad)
    assert not grads[1].any()
    assert not grads[2].any()
    assert grads[3].any()
    assert grads[0].any(0).tolist() == [True] * 42 + [False] * 22


def test_positions_behind_the_last_patch_are_never_touched() -> None:
    model = gpt2()
    adapters = adapted(model, rank=4)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 336, 1)).square().mean().backward()
        optimizer.step()
    a = factors(adapters, "wpe").A
    assert a[:, :42].all()
    assert not a[:, 42:].any()


def test_frozen_layers_follow_their_seed_alone_and_leave_the_callers_draws_alone() -> None:
    expected = torch.rand(1)
    torch.manual_seed(0)
    one = network(width=8)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(99)
    same, other = network(width=8), network(width=8, seed=1)
    found = [digest(model.frozen_layers()) for model in (one, same, other)]
    assert found[0] == found[1] != found[2]
    assert one.in_layer.weight.abs().max() <= 1 / 4
    assert one.out_layer.weight.abs().max() <= (42 * 8) ** -0.5


@pytest.mark.parametrize("kept", ["seed", "tensors"])
def test_a_file_restores_its_model_whatever_seed_its_reader_has(tmp_path: Path, kept: str) -> None:
    task = tiny_task(frozen_layers=kept, seed_of_layers=5).eval()
    stir(task.adapters)
    file = tmp_path / "set.safetensors"
    task.save_adapter(file)
    torch.manual_seed(123)
    restored = type(task).from_file(file).eval()
    x = torch.randn(2, 24, 2)
    assert torch.equal(restored(x), task(x))
    fresh = replace(restored.about, seed=6).network().eval()
    if kept == "tensors":
        load_set(fresh, file)
        assert torch.equal(fresh(x[..., :1]), task(x[..., :1])[..., 0])
    else:
        with pytest.raises(StoreError, match="the frozen layers of seed 5 have the SHA-256"):
            load_set(fresh, file)


@pytest.mark.slow
def test_on_six_blocks_of_gpt2_at_full_size_the_same_four_tensors_are_trained() -> None:
    blocks = GPT2(pretrained=False, blocks=6).build()
    model = Network(blocks, 336, Patches(16, 8), outputs=96).eval()
    adapters = adapted(model)
    assert [site.name for site in adapters.sites] == ["blocks.model.wpe", "out_layer"]
    trained = [list(p.shape) for p in model.parameters() if p.requires_grad]
    assert trained == [[16, 1024], [768, 16], [16, 32256], [96, 16]]
    assert adapters.trainable_count() == 546_304
    frozen = sum(p.numel() for p in model.blocks.parameters() if not p.requires_grad)
    assert frozen - 1024 * 768 == 6 * 7_087_872 + 2 * 768  # GPT-2's blocks and its last norm
    assert model(torch.randn(1, 336, 1)).isfinite().all()
