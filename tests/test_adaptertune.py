"""AdapterTune: the checks of its description, on timm's classes at tiny size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from polyadapt.core import (
    ZILA,
    AdaptError,
    AdapterSet,
    AdapterTune,
    Bottleneck,
    Recipe,
    Site,
    attach,
)
from polyadapt.core.layers import BlockLayer

HERE = BlockLayer(nn.Identity(), None)
WIDTHS = {"ViT-B": 768, "ViT-S": 384, "DeiT-T": 192}
TINY: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 16,
    "num_heads": 2,
    "num_classes": 5,
}


def vit(depth: int = 4) -> VisionTransformer:
    return VisionTransformer(**TINY, depth=depth).eval()


def deit() -> nn.Module:
    return VisionTransformerDistilled(**TINY, depth=4).eval()


def dinov2() -> nn.Module:
    own: dict[str, Any] = {
        "init_values": 1e-5,
        "reg_tokens": 4,
        "no_embed_class": True,
        "class_token": True,
    }
    return VisionTransformer(**TINY, **own, depth=4).eval()


def swin() -> nn.Module:
    return SwinTransformer(
        img_size=16,
        patch_size=2,
        embed_dim=8,
        depths=(2, 2),
        num_heads=(1, 2),
        window_size=4,
        num_classes=5,
    ).eval()


def block(width: int) -> Site:
    return Site("blocks.0", None, None, None, "block", (width,), "output", "a whole module")


def count(recipe: Recipe, width: int) -> int:
    return sum(p.numel() for p in recipe.build(block(width), None, None).parameters())


def wake(made: AdapterSet) -> None:
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3)


def with_head(every: int = 1) -> tuple[VisionTransformer, AdapterSet]:
    """A ViT with AdapterTune whose head is trained too, as a task does it."""
    model = vit()
    made = attach(model, AdapterTune(rank=4, every=every))
    model.head.requires_grad_(True)
    return model, made


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """The last names of the trained tensors that changed, `head` for those of the head."""
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    return {"head" if n.startswith("head.") else n.rsplit(".", 1)[-1] for n in changed}


@pytest.mark.parametrize("make", [vit, deit, dinov2, swin])
@pytest.mark.parametrize("every", [1, 2, 3, 4, 5])
def test_at_the_start_the_model_is_the_plain_one_bit_for_bit(make: object, every: int) -> None:
    assert callable(make)
    model, image = make(), torch.randn(2, 3, 16, 16)
    plain = model(image)
    made = attach(model, AdapterTune(rank=4, every=every))
    assert len(made.adapters) == math.ceil(4 / every)
    assert torch.equal(model(image), plain)
    wake(made)
    assert not torch.equal(model(image), plain)


@pytest.mark.parametrize(
    ("backbone", "rank", "trained"),
    [
        ("ViT-B", 8, 156_768),
        ("ViT-B", 16, 304_320),
        ("ViT-B", 32, 599_424),
        ("ViT-B", 64, 1_189_632),
        ("ViT-S", 8, 78_432),
        ("ViT-S", 16, 152_256),
        ("ViT-S", 32, 299_904),
        ("ViT-S", 64, 595_200),
        ("DeiT-T", 8, 39_264),
        ("DeiT-T", 16, 76_224),
        ("DeiT-T", 32, 150_144),
        ("DeiT-T", 64, 297_984),
    ],
)
def test_twelve_blocks_train_what_the_paper_counts(backbone: str, rank: int, trained: int) -> None:
    assert 12 * count(AdapterTune(rank=rank), WIDTHS[backbone]) == trained


def test_every_second_block_trains_half() -> None:
    model = VisionTransformer(**{**TINY, "embed_dim": 768, "num_heads": 12}, depth=0)
    model.blocks = nn.Sequential(*(Attending(768) for _ in range(12)))
    assert attach(model, AdapterTune(rank=16, every=2)).trainable_count() == 152_160


class Attending(nn.Module):
    """A stand-in of a block's width, so that no ViT-B is built to count."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.LayerNorm(width)


def test_at_the_first_step_only_the_up_projection_and_the_head_have_gradients() -> None:
    model, made = with_head()
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    for adapter in made.adapters.values():
        p = dict(adapter.named_parameters())
        assert all(p[name].grad is not None for name in p)
        assert not p["down"].grad.any()  # type: ignore[union-attr]
        assert not p["down_bias"].grad.any()  # type: ignore[union-attr]
        assert p["up"].grad.any()  # type: ignore[union-attr]
        assert p["up_bias"].grad.any()  # type: ignore[union-attr]
    assert model.head.get_parameter("weight").grad.any()  # type: ignore[union-attr]
    own = {id(p) for p in (*made.parameters(), *model.head.parameters())}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


def test_the_down_projection_moves_from_the_second_step_on() -> None:
    model, made = with_head()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD([*made.parameters(), *model.head.parameters()], lr=0.1)
    image = torch.randn(2, 3, 16, 16)
    expected = [{"up", "up_bias", "head"}, {"up", "up_bias", "head", "down", "down_bias"}]
    for names in expected:
        optimiser.zero_grad()
        model(image).square().sum().backward()
        optimiser.step()
        assert moved(model, before) == names


def test_an_alpha_of_zero_is_the_frozen_backbone_again_after_training() -> None:
    model, image = vit(), torch.randn(2, 3, 16, 16)
    plain = model(image)
    trained = attach(model, AdapterTune(rank=4))
    wake(trained)
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    assert not torch.equal(model(image), plain)
    trained.detach()
    silent = attach(model, AdapterTune(rank=4, alpha=0.0))
    silent.load_state_dict(state)
    assert torch.equal(model(image), plain)


def test_a_zero_up_projection_is_the_frozen_backbone_again_after_training() -> None:
    model, image = vit(), torch.randn(2, 3, 16, 16)
    plain = model(image)
    made = attach(model, AdapterTune(rank=4))
    wake(made)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("up", "up_bias")):
                parameter.zero_()
    assert torch.equal(model(image), plain)


def test_an_adapter_by_hand() -> None:
    adapter = AdapterTune(rank=1, alpha=0.5).build(block(2), None, None)
    values = {"down": [[1.0, 0.0]], "down_bias": [0.0], "up": [[2.0], [0.0]], "up_bias": [0.0, 1.0]}
    adapter.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    u = torch.tensor([1.0, 3.0])  # gelu(1) = 0.8413447
    y = adapter.output(u, u, HERE)
    torch.testing.assert_close(y, torch.tensor([1.8413447, 3.5]))


def test_a_blocks_output_depends_on_no_later_adapter() -> None:
    model, image = vit(), torch.randn(2, 3, 16, 16)
    made = attach(model, AdapterTune(rank=4))
    wake(made)
    first: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda module, args, out: first.append(out.clone()))
    whole = model(image)
    with torch.no_grad():
        for name, adapter in made.adapters.items():
            if name != "blocks.0":
                for parameter in adapter.parameters():
                    parameter.zero_()
    assert not torch.equal(model(image), whole)
    assert torch.equal(first[0], first[1])
    with torch.no_grad():
        made.adapters["blocks.0"].get_parameter("up_bias").add_(1.0)
    model(image)
    assert not torch.equal(first[0], first[2])


def test_a_small_start_differs_by_the_order_of_1e_4() -> None:
    model, tokens = vit(), torch.randn(2, 5, 16)  # a state of size 1, as in a trained backbone
    plain = model.blocks(tokens)
    attach(model, AdapterTune(rank=16, init="small"))
    relative = (model.blocks(tokens) - plain).norm() / plain.norm()
    assert 1e-4 < relative < 1e-3
    assert not AdapterTune(init="small").identity
    assert AdapterTune().identity


def test_the_papers_share_of_full_fine_tuning_is_0_917_percent() -> None:
    backbones = {"ViT-B": 85_798_656, "ViT-S": 21_665_664, "DeiT-T": 5_524_416}
    shares = []
    for backbone, frozen in backbones.items():
        width = WIDTHS[backbone]
        adapters = 12 * count(AdapterTune(rank=16), width)
        for classes in (10, 100, 10, 37, 101):  # CIFAR-10, CIFAR-100, SVHN, Pets, Food-101
            head = (width + 1) * classes
            shares.append((adapters + head) / (frozen + head))
    assert len(shares) == 15
    assert 100 * sum(shares) / 15 == pytest.approx(0.917, abs=0.0005)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_linear_adapter_reaches_the_error_of_the_best_map_of_its_rank(rank: int) -> None:
    sigma = torch.tensor([3.0, 2.0, 1.0, 0.5])
    left, right = (torch.linalg.qr(torch.randn(4, 4))[0] for _ in range(2))
    wanted = left @ sigma.diag() @ right
    u = torch.cat([torch.eye(4), -torch.eye(4)])  # squared error summed = 2 |S - BA|^2
    recipe = Bottleneck(rank=rank, activation="identity")
    adapter = recipe.build(block(4), None, torch.Generator().manual_seed(0))
    optimiser = torch.optim.LBFGS(adapter.parameters(), lr=0.5, max_iter=300)

    def error() -> Tensor:
        y = adapter.output(u, u, HERE)
        return F.mse_loss(y, u + u @ wanted.T, reduction="sum") / 2

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = error()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert error().item() == pytest.approx(sigma[rank:].square().sum().item(), rel=0.01)


# ---- settings


def test_biases_decay_only_when_asked() -> None:
    made = attach(vit(), AdapterTune(rank=4))
    groups = made.parameter_groups(lr=1e-3, weight_decay=0.05)
    assert [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in groups] == [
        (0.05, {2}),
        (0.0, {1}),
    ]
    made = attach(vit(), AdapterTune(rank=4, decay_biases=True))
    (group,) = made.parameter_groups(lr=1e-3, weight_decay=0.05)
    assert group["weight_decay"] == 0.05
    assert sum(p.numel() for p in group["params"]) == made.trainable_count()


def test_a_pattern_replaces_the_choice_of_blocks() -> None:
    made = attach(vit(), AdapterTune(rank=4, every=2), at="blocks.{1,3}")
    assert list(made.adapters) == ["blocks.1", "blocks.3"]


def test_the_settings_survive_json_and_zila_is_another_name() -> None:
    recipe = AdapterTune(rank=8, every=3, alpha=0.5, init="small", decay_biases=True)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert ZILA(rank=8) == AdapterTune(rank=8)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rank": 0}, "rank 0 is not allowed"),
        ({"every": 0}, "every=0 is not allowed: a whole number from 1"),
        ({"every": 1.5}, "every=1.5 is not allowed"),
        ({"alpha": math.inf}, "alpha=inf is not allowed"),
        ({"init": "random"}, "init='random' is not allowed: one of zero, small"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(AdaptError, match=f"AdapterTune: {told}"):
        AdapterTune(**settings)
