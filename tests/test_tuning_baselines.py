"""BitFit, LayerNorm tuning, full fine-tuning and head only: adapters that replace a tensor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from polyadapt.core import (
    AdaptError,
    AdapterSet,
    BitFit,
    FullFineTuning,
    HeadOnly,
    LayerNormTuning,
    LoRA,
    Recipe,
    activate,
    attach,
)
from polyadapt.core.adapters.layernorm_tuning import is_feature_norm
from polyadapt.core.adapters.replacement import Replacement
from polyadapt.core.sites import Site


class Mixed(nn.Module):
    """A parameter of every kind: stored as it is, flattened, transposed, a vector, a position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.position = nn.Parameter(torch.randn(1, 4, 6))
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.batch_norm = nn.BatchNorm1d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        y: Tensor = self.fc(self.batch_norm(self.norm(x).transpose(1, 2)).transpose(1, 2))
        return y


NUMBERS = torch.tensor([[0, 3, 4, 6], [4, 1, 0, 2]])
RECIPES: list[Recipe] = [BitFit(), LayerNormTuning(), FullFineTuning()]


def mixed() -> Mixed:
    torch.manual_seed(2)
    return Mixed().eval().requires_grad_(False)


def stir(adapters: AdapterSet) -> None:
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))


def test_bitfit_takes_every_bias() -> None:
    adapters = attach(mixed(), BitFit())
    assert list(adapters.adapters) == [
        "conv.bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "norm.bias",
        "batch_norm.bias",
        "fc.bias",
    ]
    assert adapters.trainable_count() == adapters.stored_count() == 6 + 18 + 6 + 6 + 6 + 5


def test_layernorm_tuning_takes_the_feature_norms_alone() -> None:
    adapters = attach(mixed(), LayerNormTuning())
    assert list(adapters.adapters) == ["norm.weight", "norm.bias"]
    assert adapters.trainable_count() == 12


def test_full_fine_tuning_takes_every_parameter() -> None:
    model = mixed()
    names, count = (
        [name for name, _ in model.named_parameters()],
        sum(p.numel() for p in model.parameters()),
    )
    adapters = attach(model, FullFineTuning())
    assert [f"{s.path}.{s.parameter}".lstrip(".") for s in adapters.sites] == names
    assert adapters.trainable_count() == count


def test_only_biases_are_called_so() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("bias", "q_bias", "bias_k", "relative_position_bias_table", "debias"):
                self.register_parameter(name, nn.Parameter(torch.zeros(2)))

    assert BitFit().default_at(Named()) == ["bias", "q_bias"]


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (nn.LayerNorm(4), True),
        (nn.GroupNorm(2, 4), True),
        (nn.RMSNorm(4), True),
        (timm.layers.LayerNorm2d(4), True),
        (timm.layers.GroupNorm1(4), True),
        (timm.layers.RmsNorm(4), True),
        (timm.layers.SimpleNorm(4), True),
        (timm.layers.LayerNormAct(4), True),
        (type("LlamaRMSNorm", (nn.Module,), {})(), True),
        (nn.BatchNorm2d(4), False),
        (timm.layers.BatchNormAct2d(4), False),
        (nn.Linear(4, 4), False),
    ],
)
def test_norms_over_features_are_recognised(module: nn.Module, found: bool) -> None:
    assert is_feature_norm(module) == found


def test_a_vision_transformer_has_the_counts_of_its_width() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0)
    width, depth = 192, 2
    norms = attach(model, LayerNormTuning(), name="norms")
    assert norms.trainable_count() == (2 * depth + 1) * 2 * width
    biases = attach(model, BitFit(), name="biases")
    per_block = 2 * width + 3 * width + width + 4 * width + width
    assert biases.trainable_count() == depth * per_block + width + width  # norm, patch embedding


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_new_set_changes_no_bit(recipe: Recipe, dtype: torch.dtype) -> None:
    model = mixed().to(dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():  # torch takes other kernels where a gradient is wanted
        untouched = model(NUMBERS)
        adapters = attach(model, recipe)
        assert torch.equal(model(NUMBERS), untouched)
    for site in adapters.sites:
        module = model.get_submodule(site.path)
        name = f"{site.path}.{site.parameter}".lstrip(".")
        assert torch.equal(getattr(module, site.parameter or ""), before[name])
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in adapters.parameters()} == {kept}


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_detaching_restores_the_same_bits(recipe: Recipe) -> None:
    model = mixed()
    model.conv.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    adapters = attach(model, recipe)
    stir(adapters)
    moved = model(NUMBERS)
    with activate(model, None):
        assert not torch.allclose(model(NUMBERS), moved)
    adapters.merge()
    torch.testing.assert_close(model(NUMBERS), moved)
    adapters.detach()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [p.requires_grad for p in model.parameters()] == flags


def train(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    optimiser = torch.optim.AdamW(groups)
    for _ in range(3):
        optimiser.zero_grad()
        model(NUMBERS).square().mean().backward()
        optimiser.step()


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_training_a_set_is_training_the_backbone_with_weight_decay(recipe: Recipe) -> None:
    model, twin = mixed(), mixed()
    adapters = attach(model, recipe)
    train(model, adapters.parameter_groups(lr=0.01, weight_decay=0.5))
    own = dict(twin.named_parameters())
    own_at_start = copy.deepcopy(own)
    names = [f"{s.path}.{s.parameter}".lstrip(".") for s in adapters.sites]
    for name, parameter in own.items():
        parameter.requires_grad_(name in names)
    train(
        twin,
        [
            {"params": [own[n]], "lr": 0.01, "weight_decay": 0.5 if own[n].ndim > 1 else 0.0}
            for n in names
        ],
    )
    for site, name in zip(adapters.sites, names, strict=True):
        trained = getattr(model.get_submodule(site.path), site.parameter or "")
        torch.testing.assert_close(trained, own[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(trained, own_at_start[name])


def test_a_part_of_a_projection_can_be_trained_alone() -> None:
    model = mixed()
    adapters = attach(model, FullFineTuning(), at="attention.in_proj_weight[v]")
    assert adapters.trainable_count() == 36
    stir(adapters)
    with activate(model, None):
        untouched = model.attention.in_proj_weight.detach()
    changed = model.attention.in_proj_weight.ne(untouched)
    assert changed[12:].all()
    assert not changed[:12].any()


def test_reading_a_transposed_copy_moves_no_data() -> None:
    stored = torch.randn(7, 6)  # an embedding's table, its matrix is the transpose
    value = Replacement(stored.t()).value
    assert value.t().is_contiguous()
    assert value.t().contiguous().data_ptr() == value.data_ptr()
    assert value.data_ptr() != stored.data_ptr()


def test_small_steps_on_a_bf16_backbone_are_not_lost() -> None:
    linear = nn.Linear(1, 1, dtype=torch.bfloat16)
    nn.init.constant_(linear.weight, 1)
    adapter = attach(nn.Sequential(linear), FullFineTuning(), at="0").adapters["0"]
    for _ in range(8):
        with torch.no_grad():
            adapter.get_parameter("value").add_(2**-10)  # an eighth of bf16's spacing at 1
    assert linear.weight.item() == 1 + 2**-7


def test_default_sites_are_the_backbones_own_while_another_set_is_attached() -> None:
    model = mixed()
    before = [list(recipe.default_at(model)) for recipe in RECIPES]
    attach(model, LoRA(rank=2), at=["fc", "conv"], name="lora")
    attach(model, FullFineTuning(), name="full")
    assert [list(recipe.default_at(model)) for recipe in RECIPES] == before


def test_tensors_of_whole_numbers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("steps", nn.Parameter(torch.zeros(2, dtype=torch.int64), False))
    assert FullFineTuning().default_at(model) == ["0.weight", "0.bias"]
    with pytest.raises(AdaptError, match=r"steps holds torch.int64: it cannot be trained"):
        attach(model, FullFineTuning(), at="steps")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (BitFit(), "Sequential has no parameter called bias"),
        (LayerNormTuning(), "Sequential has no LayerNorm, GroupNorm or RMSNorm"),
    ],
)
def test_a_backbone_with_nothing_to_tune_is_refused(recipe: Recipe, message: str) -> None:
    with pytest.raises(AdaptError, match=message):
        attach(nn.Sequential(nn.Linear(2, 2, bias=False)), recipe)


def test_a_whole_module_is_refused_by_name() -> None:
    site = Site("blocks.0", None, None, None, "block", (6,), "output", "a whole module")
    with pytest.raises(AdaptError, match=r"blocks\.0 is a whole module: name its parameters"):
        FullFineTuning().build(site, None, None)


def test_head_only_adapts_nothing() -> None:
    model = mixed()
    with torch.no_grad():
        untouched = model(NUMBERS)
        adapters = attach(model, HeadOnly())
        assert torch.equal(model(NUMBERS), untouched)
    assert adapters.trainable_count() == adapters.stored_count() == len(adapters.sites) == 0
    assert not any(p.requires_grad for p in model.parameters())
    adapters.detach()
    with pytest.raises(AdaptError, match="HeadOnly builds no adapters"):
        attach(model, HeadOnly(), at="fc")


@pytest.mark.parametrize(
    "recipe", [BitFit(), LayerNormTuning(), FullFineTuning(), HeadOnly()], ids=repr
)
def test_recipes_survive_json(recipe: Recipe) -> None:
    assert Recipe.from_json(recipe.to_json()) == recipe
