"""AdaptFormer and Adapter+: their formulas by hand, their starts, their published counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn

from polyadapt.core import Adapter, AdapterPlus, AdaptError, AdaptFormer, Recipe, Site, attach
from polyadapt.core.layers import BlockLayer
from polyadapt.core.recipe import ActsOnOutput

HERE = BlockLayer(nn.Identity(), None)
MEAN_VTAB_HEAD = 38_045  # numbers of a head on ViT-B, mean over the 19 tasks
TINY: dict[str, Any] = {"img_size": 16, "num_classes": 5}


def vit() -> nn.Module:
    return VisionTransformer(**TINY, patch_size=8, embed_dim=16, depth=3, num_heads=2).eval()


def swin() -> nn.Module:
    sizes: dict[str, Any] = {"patch_size": 2, "embed_dim": 8, "window_size": 4}
    made: nn.Module = SwinTransformer(**TINY, **sizes, depths=(2, 2), num_heads=(1, 2)).eval()
    return made


@torch.no_grad()
def out_of(model: nn.Module, image: Tensor) -> Tensor:
    y: Tensor = model(image)
    return y


def built(recipe: Recipe, width: int = 768) -> Adapter:
    site = Site("blocks.0", None, None, None, "block", (width,), "output", "a whole module")
    return recipe.build(site, None, Generator().manual_seed(0))


def output(adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
    assert isinstance(adapter, ActsOnOutput)
    return adapter.output(x, y, HERE)


def on_vit_b(recipe: Recipe) -> int:
    return 12 * sum(p.numel() for p in built(recipe).parameters())


def in_millions(count: int) -> str:
    return f"{count / 1e6:.2f}"


def fill(adapter: Adapter, **values: Any) -> None:
    with torch.no_grad():
        for name, value in values.items():
            adapter.get_parameter(name).copy_(torch.tensor(value))


# AdaptFormer


def test_adaptformer_by_hand() -> None:
    adapter = built(AdaptFormer(rank=1, scale=0.5, dropout=0.0), width=2)
    fill(adapter, down=[[1, 2]], down_bias=[-1], up=[[2], [0]], up_bias=[0, 1])
    x1, y = torch.tensor([[1.0, 3.0], [-1.0, 0.0]]), torch.tensor([[10.0, 20.0], [10.0, 20.0]])
    # hidden: relu(1 + 6 - 1) = 6, relu(-1 + 0 - 1) = 0
    assert output(adapter, x1, y).tolist() == [[16.0, 20.5], [10.0, 20.5]]


def test_adaptformer_sees_the_state_before_the_blocks_second_norm() -> None:
    model, image = vit(), torch.randn(2, 3, 16, 16)
    entering: list[Tensor] = []
    leaving: list[Tensor] = []
    norm, block = model.get_submodule("blocks.1.norm2"), model.get_submodule("blocks.1")
    norm.register_forward_hook(lambda _, args, out: entering.append(args[0]))
    block.register_forward_hook(lambda _, args, out: leaving.append(out))
    out_of(model, image)
    made = attach(model, AdaptFormer(rank=4), at="blocks.1")
    adapter = made.adapters["blocks.1"]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    out_of(model, image)
    down, up = adapter.get_parameter("down"), adapter.get_parameter("up")
    hidden = (entering[0] @ down.T + adapter.get_parameter("down_bias")).relu()
    branch = hidden @ up.T + adapter.get_parameter("up_bias")
    torch.testing.assert_close(leaving[1], leaving[0] + 0.1 * branch)


@pytest.mark.parametrize("make", [vit, swin])
def test_adaptformer_starts_as_the_frozen_backbone_on_every_block(make: Any) -> None:
    model, image = make(), torch.randn(2, 3, 16, 16)
    before = out_of(model, image)
    made = attach(model, AdaptFormer(rank=4))
    assert len(made.adapters) == (3 if make is vit else 4)
    assert torch.equal(out_of(model, image), before)
    assert AdaptFormer().identity


def test_adaptformers_down_projection_is_uniform_within_1_by_the_root_of_d() -> None:
    largest = built(AdaptFormer(), width=256).get_parameter("down").abs().max().item()
    assert 0.99 / 16 < largest <= 1 / 16


def test_adaptformer_has_the_published_settings() -> None:
    assert AdaptFormer() == AdaptFormer(rank=64, scale=0.1, dropout=0.1, norm=False)
    assert on_vit_b(AdaptFormer()) == 1_189_632


def test_the_published_count_of_adaptformer_means_biases_and_no_norm() -> None:
    assert on_vit_b(AdaptFormer(rank=8)) == 156_768
    assert in_millions(on_vit_b(AdaptFormer(rank=8))) == "0.16"
    assert in_millions(on_vit_b(AdaptFormer(rank=8, norm=True))) == "0.18"
    assert in_millions(12 * 2 * 768 * 8) == "0.15"  # without biases


# Adapter+


def test_adapter_plus_by_hand() -> None:
    adapter = built(AdapterPlus(rank=1), width=2)
    fill(adapter, down=[[1, 0]], down_bias=[0], up=[[2], [0]], up_bias=[0, 1], scale=[0.5, -3])
    u = torch.tensor([1.0, 3.0])  # gelu(1) = 0.8413447; the branch is (1.6826895, 1)
    x = torch.full_like(u, torch.nan)  # what the block was called with does not matter
    torch.testing.assert_close(output(adapter, x, u), torch.tensor([1.8413447, 0.0]))


def test_adapter_plus_starts_small_with_a_scale_of_one() -> None:
    adapter = built(AdapterPlus(rank=64))
    for name in ("down", "up"):
        matrix = adapter.get_parameter(name)
        assert matrix.abs().max().item() <= 0.02
        assert matrix.std().item() == pytest.approx(0.01 * 0.8796, rel=0.02)  # cut at 2 deviations
    assert adapter.get_parameter("scale").tolist() == [1.0] * 768
    assert not any(adapter.get_parameter(name).any() for name in ("down_bias", "up_bias"))


def test_adapter_plus_starts_near_the_frozen_backbone_but_not_at_it() -> None:
    model, image = vit(), torch.randn(2, 3, 16, 16)
    before = out_of(model, image)
    attach(model, AdapterPlus(rank=4))
    apart = ((out_of(model, image) - before).norm() / before.norm()).item()
    assert 0 < apart < 1e-2
    assert not AdapterPlus().identity


def test_the_published_count_of_adapter_plus_means_a_scale_and_the_mean_head() -> None:
    assert on_vit_b(AdapterPlus()) == 165_984
    assert in_millions(on_vit_b(AdapterPlus()) + MEAN_VTAB_HEAD) == "0.20"
    without = on_vit_b(AdapterPlus()) - 12 * 768
    assert in_millions(without + MEAN_VTAB_HEAD) == "0.19"


# Both


@pytest.mark.parametrize("method", [AdaptFormer, AdapterPlus])
def test_the_settings_survive_json(method: type[AdaptFormer] | type[AdapterPlus]) -> None:
    assert Recipe.from_json(method(rank=3).to_json()) == method(rank=3)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: AdaptFormer(rank=0), "AdaptFormer: rank 0 is not allowed"),
        (lambda: AdaptFormer(scale=math.nan), "AdaptFormer: scale=nan is not allowed"),
        (lambda: AdaptFormer(dropout=1.0), "AdaptFormer: dropout=1.0 is not allowed"),
        (lambda: AdapterPlus(rank=True), "AdapterPlus: rank True is not allowed"),
        (lambda: built(AdapterPlus(rank=5), width=4), "rank 5 does not fit blocks.0"),
        (lambda: attach(nn.Sequential(nn.Linear(2, 2)), AdaptFormer()), "'blocks'"),
    ],
)
def test_a_setting_or_a_place_that_does_not_fit_is_refused(make: Any, told: str) -> None:
    with pytest.raises(AdaptError, match=told):
        make()
