"""VPT: equal to blocks that are called with prompts by hand; refused where prompts are wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Generator, Tensor, nn

from polyadapt.core import (
    VPT,
    AdaptError,
    AdapterSet,
    AdapterTune,
    LoRA,
    Recipe,
    Site,
    activate,
    attach,
)
from polyadapt.core.errors import SiteError

TINY: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_classes": 0}


def vit(**settings: Any) -> Any:
    sizes = {**TINY, "depth": 3, "num_heads": 2, **settings}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=Generator().manual_seed(3))


def out_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
    return y


def embedded(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    return y


def with_prompts(x: Tensor, prompts: Tensor) -> Tensor:
    """Behind the class token, as the authors do."""
    return torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], dim=1)


def without(x: Tensor, number: int) -> Tensor:
    return torch.cat([x[:, :1], x[:, 1 + number :]], dim=1)


@torch.no_grad()
def by_hand(model: Any, prompts: list[Tensor], x: Tensor, deep: bool) -> Tensor:
    """The class token's feature of VPT, written out."""
    x = embedded(model, x)
    if not deep:
        x = with_prompts(x, prompts[0])
    for number, block in enumerate(model.blocks):
        x = without(block(with_prompts(x, prompts[number])), 4) if deep else block(x)
    feature: Tensor = model.norm(x)[:, 0]
    return feature


def prompts_of(made: AdapterSet) -> list[Tensor]:
    return [adapter.get_parameter("prompts").detach() for adapter in made.adapters.values()]


# What it computes


@pytest.mark.parametrize("deep", [True, False])
def test_it_equals_prompts_put_in_by_hand(deep: bool) -> None:
    model, base, x = vit(), vit(), images()
    base.load_state_dict(model.state_dict())
    made = attach(model, VPT(prompts=4, deep=deep))
    assert list(made.adapters) == (["blocks.0", "blocks.1", "blocks.2"] if deep else ["blocks"])
    wanted = by_hand(base, prompts_of(made), x, deep)
    torch.testing.assert_close(out_of(model, x), wanted)
    assert not torch.allclose(wanted, out_of(base, x), atol=1e-2)


@pytest.mark.parametrize("deep", [True, False])
def test_the_tokens_that_leave_are_those_of_the_image(deep: bool) -> None:
    model = vit()
    attach(model, VPT(prompts=4, deep=deep))
    assert model.forward_features(images()).shape == (2, 5, 24)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_prompts_are_in_no_pooled_feature(pool: str) -> None:
    model, x = vit(global_pool=pool, class_token=pool == "token"), images()
    before = out_of(model, x)
    attach(model, VPT(prompts=2))
    tokens = model.norm(model.blocks(embedded(model, x)))
    wanted = tokens.mean(1) if pool == "avg" else tokens[:, 0]
    torch.testing.assert_close(out_of(model, x), model.fc_norm(wanted))
    assert before.shape == wanted.shape


def test_twelve_blocks_of_vit_b_train_12_p_768_numbers() -> None:
    site = Site("blocks.0", None, None, None, "block", (768,), "output", "a whole module")
    for prompts in (1, 10, 50):
        adapter = VPT(prompts=prompts).build(site, None, None)
        assert 12 * sum(p.numel() for p in adapter.parameters()) == 12 * prompts * 768
    assert attach(vit(), VPT(prompts=7, deep=False)).trainable_count() == 7 * 24


def test_prompts_start_uniform_within_the_bound_of_patch_and_width() -> None:
    site = Site("blocks.0", None, None, None, "block", (768,), "output", "a whole module")
    for patch, bound in ((16, math.sqrt(6 / (768 + 768))), (14, math.sqrt(6 / (588 + 768)))):
        recipe = VPT(prompts=50, patch_size=patch)
        first, again = (recipe.build(site, None, Generator().manual_seed(1)) for _ in range(2))
        prompts = first.get_parameter("prompts")
        assert 0.99 * bound < prompts.abs().max().item() <= bound
        assert prompts.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert torch.equal(prompts, again.get_parameter("prompts"))
    assert not VPT().identity


# Training, several sets


@pytest.mark.parametrize("deep", [True, False])
def test_gradients_reach_all_prompts_and_nothing_else(deep: bool) -> None:
    model = vit()
    made = attach(model, VPT(prompts=4, deep=deep), probe=images())
    model.train()(images()).square().sum().backward()
    assert all(bool(p.grad.abs().sum(1).all()) for p in made.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in made.parameters())
    own = {id(p) for p in made.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


def test_shallow_prompts_are_refused_under_gradient_checkpointing() -> None:
    model = vit()
    model.set_grad_checkpointing(True)
    with pytest.raises(SiteError, match="checkpoints its blocks one by one and never calls blocks"):
        attach(model, VPT(prompts=4, deep=False))
    model.set_grad_checkpointing(False)
    assert attach(model, VPT(prompts=4, deep=False)).trainable_count() == 96


def test_deep_prompts_work_under_gradient_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = vit()
        model.set_grad_checkpointing(checkpointing)
        made = attach(model, VPT(prompts=4), generator=Generator().manual_seed(0))
        model.train()(images()).square().sum().backward()
        gradients.append([p.grad for p in made.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("deep", [True, False])
def test_samples_of_one_batch_may_have_other_numbers_of_prompts(deep: bool) -> None:
    model, x = vit(), images(4)
    attach(model, VPT(prompts=4, deep=deep), name="four")
    attach(model, VPT(prompts=1, deep=deep), name="one")
    attach(model, LoRA(rank=2), at="blocks.*.attn.qkv", name="lora")
    names = ["one", None, "four", "lora"]
    with activate(model, per_sample=names):
        mixed = out_of(model, x)
    for number, name in enumerate(names):
        with activate(model, name):
            torch.testing.assert_close(mixed[number], out_of(model, x)[number])


def test_two_sets_of_prompts_and_an_adapter_act_together() -> None:
    model, base, x = vit(), vit(), images()
    base.load_state_dict(model.state_dict())
    made = [attach(model, VPT(prompts=p), name=f"p{p}") for p in (3, 1)]
    attach(model, AdapterTune(rank=2), name="tune")  # zero at the start
    with activate(model, ["p3", "p1", "tune"]):
        together = out_of(model, x)
    joined = [torch.cat(pair) for pair in zip(*map(prompts_of, made), strict=True)]
    torch.testing.assert_close(together, by_hand(base, joined, x, deep=True))


def test_attaching_leaves_modes_and_outputs_of_other_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = vit(drop_path_rate=0.1).train(), images()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    attach(model, LoRA(rank=2), at="blocks.*.attn.qkv", name="lora")
    random = torch.get_rng_state()
    attach(model, VPT(prompts=2), name="vpt", generator=Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), random)
    own = [m.training for n, m in model.named_modules() if "drawer" not in n]
    assert own == modes
    with activate(model, ["lora", "vpt"]):
        assert out_of(model, x).shape == (2, 24)


# What is refused


ONE_BLOCK = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
WINDOWS = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1)}


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("beit_base_patch16_224", ONE_BLOCK, "blocks.0 cannot be given prompts: it fails on"),
        ("vit_relpos_small_patch16_224", ONE_BLOCK, "blocks.0 cannot be given prompts: it fails"),
        ("eva02_tiny_patch14_224", ONE_BLOCK, r"Eva turns queries and keys by position \(rope\)"),
        (
            "swin_tiny_patch4_window7_224",
            WINDOWS | {"num_heads": (1, 1)},
            "layers.0.blocks.0 cannot be given prompts: it fails on tokens",
        ),
    ],
)
def test_backbones_to_which_the_place_of_a_token_matters_are_refused(
    name: str, settings: dict[str, Any], told: str
) -> None:
    model = timm.create_model(name, pretrained=False, num_classes=0, **settings)
    before = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(SiteError, match=told):
        attach(model, VPT(prompts=2))
    assert {path: type(module) for path, module in model.named_modules()} == before


class Attending(nn.Module):
    """Self-attention on tokens, with a mask or without."""

    def __init__(self, batch_first: bool = True, causal: bool = False) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1] if self.attn.batch_first else x.shape[0]
        mask = torch.full((size, size), -torch.inf).triu(1) if self.causal else None
        y: Tensor = self.attn(x, x, x, attn_mask=mask)[0]
        return x + y


class Weighted(Attending):
    """Position decides by a vector that fits any number of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.arange(1, x.shape[1] + 1)[:, None])


class Pooled(Attending):
    """Returns half as many tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, ::2]


@pytest.mark.parametrize(
    ("block", "told"),
    [
        (Attending(causal=True), "do not meet, or only those before them"),
        (Attending(batch_first=False), "do not meet"),
        (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), "do not meet"),
        (Weighted(), "their order matters"),
        (Pooled(), "does not return its tokens"),
    ],
)
def test_blocks_that_do_not_treat_tokens_as_a_set_are_refused(block: nn.Module, told: str) -> None:
    with pytest.raises(SiteError, match=f"VPT: 0 cannot be given prompts: .*{told}"):
        attach(nn.Sequential(block), VPT(prompts=2), at="0")
    attach(nn.Sequential(Attending()), VPT(prompts=2), at="0")


def test_shallow_prompts_need_one_list_that_is_called() -> None:
    model = vit()
    model.blocks = nn.ModuleList(model.blocks)
    with pytest.raises(AdaptError, match="called as a whole"):
        attach(model, VPT(deep=False))


def test_a_site_that_is_no_block_and_a_state_that_is_no_tokens_are_refused() -> None:
    with pytest.raises(SiteError, match=r"blocks\.0\.attn\.qkv is a linear"):
        attach(vit(), VPT(), at="blocks.0.attn.qkv")
    model = nn.Sequential(Attending())
    attach(model, VPT(prompts=2), at="0")
    with pytest.raises(SiteError, match=r"0 was given \[5, 8\]: prompts need tokens \[n, t, 8\]"):
        model(torch.zeros(5, 8))


@pytest.mark.parametrize("settings", [{"prompts": 0}, {"prompts": 2.0}, {"patch_size": True}])
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(AdaptError, match="is not allowed: a whole number from 1"):
        VPT(**settings)


def test_the_settings_survive_json() -> None:
    recipe = VPT(prompts=3, deep=False, patch_size=14)
    assert Recipe.from_json(recipe.to_json()) == recipe
