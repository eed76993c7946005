"""IA3: gains on what a layer puts out or takes in, and where they sit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn

from polyadapt.core import IA3, AdaptError, AdapterSet, LoRA, Recipe, activate, attach, select
from polyadapt.core.adapters.ia3 import InputGain, OutputGain
from polyadapt.tests.factor_cases import layers, site_at


def set_gains(made: AdapterSet, seed: int = 0) -> None:
    with torch.no_grad():
        for n, parameter in enumerate(made.parameters()):
            own = Generator().manual_seed(seed + n)
            parameter.copy_(1 + torch.rand(parameter.shape, generator=own))


def ones() -> tuple[nn.Module, nn.Linear]:
    """y = [x0 + x1 + 10, x0 + x1 + 20], and its layer."""
    layer = nn.Linear(2, 2)
    layer.weight.data, layer.bias.data = torch.ones(2, 2), torch.tensor([10.0, 20.0])
    return nn.Sequential(layer), layer


def pair(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.GELU(), nn.Linear(6, 3, bias=bias))


def second(model: nn.Sequential) -> nn.Linear:
    """The second linear layer of `pair`."""
    layer = model[2]
    assert isinstance(layer, nn.Linear)
    return layer


def vit() -> VisionTransformer:
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3
    ).eval()


@pytest.mark.parametrize(("model", "x"), layers())
def test_gains_of_one_change_no_bit(model: nn.Module, x: Tensor) -> None:
    site, layer = site_at(model, "0")
    adapter = IA3().build(site, layer.matrix().detach(), None)
    assert isinstance(adapter, OutputGain)
    y = model(x)
    assert torch.equal(adapter.output(x, y, layer), y)
    assert torch.equal(adapter.weight(layer.matrix()), layer.matrix())


def test_the_gain_scales_the_product_and_not_the_bias() -> None:
    model, layer = ones()
    made = attach(model, IA3(), at="0")
    made.adapters["0"].get_parameter("gain").data = torch.tensor([2.0, 3.0])
    assert model(torch.tensor([[1.0, 2.0]])).tolist() == [[16.0, 29.0]]  # 2 * 3 + 10, 3 * 3 + 20
    made.merge()
    assert layer.weight.tolist() == [[2.0, 2.0], [3.0, 3.0]]
    assert layer.bias.tolist() == [10.0, 20.0]


def test_a_gain_on_the_input_scales_columns() -> None:
    model, layer = ones()
    made = attach(model, IA3(inputs=["0"]), at="0")
    made.adapters["0"].get_parameter("gain").data = torch.tensor([2.0, 3.0])
    assert model(torch.tensor([[1.0, 2.0]])).tolist() == [[18.0, 28.0]]  # 2 + 6 + bias
    made.merge()
    assert layer.weight.tolist() == [[2.0, 3.0], [2.0, 3.0]]


@pytest.mark.parametrize("inputs", [[], ["2"], ["0", "2"]])
def test_it_equals_peft_where_there_is_no_bias(inputs: list[str]) -> None:
    from peft import IA3Config, get_peft_model

    model, base, x = pair(bias=False), pair(bias=False), torch.randn(5, 4)
    made = attach(model, IA3(inputs=inputs), at="{0,2}")
    config = IA3Config(target_modules=["0", "2"], feedforward_modules=inputs)
    theirs: Any = get_peft_model(base, config).base_model.model
    set_gains(made)
    with torch.no_grad():
        for place, adapter in made.adapters.items():
            own = theirs[int(place)].ia3_l["default"]
            own.copy_(adapter.get_parameter("gain").reshape(own.shape))
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(model(x), pair(bias=False)(x), rtol=0.1)
    for call in (model, theirs):
        call(x).square().sum().backward()
    for place, adapter in made.adapters.items():
        gradient = theirs[int(place)].ia3_l["default"].grad.flatten()
        torch.testing.assert_close(adapter.get_parameter("gain").grad, gradient)


def test_with_a_bias_peft_scales_it_too() -> None:
    from peft import IA3Config, get_peft_model

    model, x = pair(), torch.randn(5, 4)
    bias = second(model).bias.clone()
    made = attach(model, IA3(), at="2")
    made.adapters["2"].get_parameter("gain").data.fill_(3.0)
    config = IA3Config(target_modules=["2"], feedforward_modules=[])
    theirs: Any = get_peft_model(pair(), config).base_model.model
    theirs[2].ia3_l["default"].data.fill_(3.0)
    torch.testing.assert_close(theirs(x) - model(x), (2 * bias).expand(5, 3))


def test_without_sites_a_vit_gets_keys_values_and_second_mlp_layers() -> None:
    model = vit()
    made = attach(model, IA3())
    assert list(made.adapters) == [
        f"blocks.{n}.{place}"
        for n in range(2)
        for place in ("attn.qkv[k]", "attn.qkv[v]", "mlp.fc2")
    ]
    kinds = [type(adapter) for adapter in made.adapters.values()]
    assert kinds == [OutputGain, OutputGain, InputGain] * 2
    assert made.trainable_count() == made.stored_count() == 2 * (16 + 16 + 4 * 16)
    x = torch.randn(2, 3, 16, 16)
    with activate(model, None):
        y = model(x)
    assert torch.equal(model(x), y)
    set_gains(made)
    adapted = model(x)
    made.merge()
    torch.testing.assert_close(model(x), adapted)
    assert not torch.allclose(adapted, y, atol=1e-3)


def test_two_sets_multiply_their_gains() -> None:
    model, x = pair(), torch.randn(5, 4)
    for name, seed in (("a", 1), ("b", 20)):
        set_gains(attach(model, IA3(inputs=["0"]), at="{0,2}", name=name), seed)
    with activate(model, ["a", "b"]):
        both = model(x)
    with activate(model, ["b", "a"]):
        torch.testing.assert_close(model(x), both)
    with activate(model, "a"):
        assert not torch.allclose(model(x), both)


def test_gains_on_a_lora_scale_its_update_too() -> None:
    model, x = pair(), torch.randn(5, 4)
    lora = attach(model, LoRA(rank=2), at="2", name="lora")
    gains = attach(model, IA3(), at="2", name="gains")
    set_gains(lora)
    set_gains(gains)
    with activate(model, ["lora", "gains"]):
        both = model(x)
    with activate(model, "lora"):
        y = model(x)
    bias = second(model).bias
    gain = gains.adapters["2"].get_parameter("gain")
    torch.testing.assert_close(both, gain * (y - bias) + bias)


def test_weight_decay_leaves_the_gains_alone() -> None:
    made = attach(pair(), IA3(), at="{0,2}")
    (group,) = made.parameter_groups(lr=0.1, weight_decay=0.5)
    assert group["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("model", "at", "message"),
    [
        (nn.Sequential(nn.Conv2d(2, 3, 1)), "0", "0 is of kind conv2d: inputs takes linear"),
        (nn.Sequential(nn.Embedding(5, 3)), "0", "IA3: 0 is of kind embedding"),
        (vit(), "blocks.0.attn.qkv[v]", "is a part of a layer that is called"),
        (vit(), "blocks.0", "blocks.0 is a whole module"),
        (vit(), "norm.weight", r"norm\.weight is of shape \[16\]"),
    ],
)
def test_sites_without_an_input_of_their_own_are_refused(
    model: nn.Module, at: str, message: str
) -> None:
    with pytest.raises(AdaptError, match=message):
        attach(model, IA3(inputs=[at.removesuffix("[v]")]), at=at)


def test_a_part_whose_weight_is_read_may_have_gains_on_its_input() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    made = attach(model, IA3(inputs=["in_proj_weight"]), at="0.in_proj_weight[q]")
    assert [type(a) for a in made.adapters.values()] == [InputGain]


def test_patterns_that_fit_no_site_are_refused() -> None:
    with pytest.raises(AdaptError, match=r"IA3: inputs has 'fc3', which fits none of the 2 sites"):
        attach(pair(), IA3(inputs=["fc3"]), at="{0,2}")
    with pytest.raises(AdaptError, match="inputs='0' is not allowed: a list of patterns"):
        IA3(inputs="0")


def test_models_without_the_published_places_need_sites() -> None:
    model = vit()
    del model.get_submodule("blocks.1.mlp").fc2
    with pytest.raises(AdaptError, match=r"IA3: blocks\.1 of VisionTransformer has no attn\.qkv"):
        select(model, IA3().default_at(model))


def test_settings_survive_json() -> None:
    recipe = IA3(inputs=["a", "b.*"])
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert hash(recipe) == hash(IA3(inputs=("a", "b.*")))
