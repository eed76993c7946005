"""Cached states of the frozen prefix: the backbone's outputs and gradients, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from polyadapt.core import VPT, AdaptError, FullFineTuning, LoRA, PrefixCache, attach
from polyadapt.core.order import epoch_loader
from polyadapt.tests.test_training import Task
from polyadapt.tests.test_training import vit as training_vit
from polyadapt.tests.training_cases import quiet_trainer

HUGE = {"samples": 10**15, "max_bytes": 10**15 + 159}
STATE = 5 * 8 * 4  # bytes: 4 patches and the class token, 8 numbers each, in single precision


def vit(**options: Any) -> VisionTransformer:
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=8, depth=3, num_heads=2, num_classes=0, **options
    )


def adapted(at: str = "blocks.2.attn.qkv", **options: Any) -> VisionTransformer:
    model = vit(**options)
    attach(model, LoRA(rank=2, init="kaiming"), at=at)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return model


def pictures(number: int = 4) -> Tensor:
    return torch.randn(number, 3, 16, 16)


def calls_of(module: nn.Module) -> list[int]:
    """The batch sizes that a module is called with."""
    sizes: list[int] = []
    module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


@pytest.mark.parametrize(
    ("at", "first"),
    [("blocks.2.attn.qkv", 2), ("blocks.{1,2}.mlp.fc1", 1), ("blocks.*.attn.qkv", 0)],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_outputs_and_gradients_are_the_backbone_s_and_the_prefix_runs_once(
    at: str, first: int, mapped: bool, tmp_path: Path
) -> None:
    model, images = adapted(at), pictures()
    cached = PrefixCache(model, samples=4, folder=tmp_path if mapped else None)
    assert cached.first == first
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = model(images)
    wanted = torch.autograd.grad(plain.square().sum(), trained)
    embedded = calls_of(model.patch_embed)
    for _ in range(3):
        found = cached(images, range(4))
        assert torch.equal(found, plain)
        gradients = torch.autograd.grad(found.square().sum(), trained)
        assert all(torch.equal(g, w) for g, w in zip(gradients, wanted, strict=True))
    assert embedded == [4]
    assert list(tmp_path.iterdir()) == []


def test_samples_are_known_by_their_keys_in_any_order() -> None:
    model, images = adapted(), pictures()
    cached = PrefixCache(model, samples=4)
    embedded = calls_of(model.patch_embed)
    cached(images[:2], [0, 1])
    order = torch.tensor([3, 1, 2, 0])
    found = cached(images[order], order)
    assert embedded == [2, 2]
    assert torch.allclose(found, model(images[order]), atol=1e-6)


def test_no_more_is_kept_than_the_bound_allows() -> None:
    model, images = adapted(), pictures()
    cached = PrefixCache(model, samples=4, max_bytes=3 * STATE - 1)
    embedded = calls_of(model.patch_embed)
    for _ in range(2):
        found = cached(images, range(4))
    assert len(cached) == 2
    assert embedded == [4, 2]
    assert torch.allclose(found, model(images), atol=1e-6)


@pytest.mark.parametrize(
    "name", ["blocks.1.mlp.fc1.weight", "pos_embed", "cls_token", "patch_embed.proj.bias"]
)
def test_states_of_other_weights_are_thrown_away(name: str) -> None:
    model, images = adapted(), pictures()
    cached = PrefixCache(model, samples=4)
    before = cached(images, range(4))
    with torch.no_grad():
        model.get_parameter(name).add_(0.5 * torch.randn_like(model.get_parameter(name)))
    after = cached(images, range(4))
    assert torch.equal(after, model(images))
    assert not torch.allclose(before, after, atol=1e-3)


def test_weights_behind_the_prefix_may_change() -> None:
    model, images = adapted(), pictures()
    cached = PrefixCache(model, samples=4)
    cached(images, range(4))
    embedded = calls_of(model.patch_embed)
    with torch.no_grad():
        model.get_parameter("blocks.2.mlp.fc1.weight").mul_(2)
    assert torch.equal(cached(images, range(4)), model(images))
    assert embedded == [4]  # the backbone's own call


def test_a_set_on_the_list_of_blocks_acts() -> None:
    model, images = vit(), pictures()
    frozen = model(images)
    attach(model, VPT(prompts=2, deep=False))
    wanted = model(images)
    cached = PrefixCache(model, samples=4)
    assert cached.first == 0
    assert all(torch.equal(cached(images, range(4)), wanted) for _ in range(2))
    assert not torch.allclose(frozen, wanted, atol=1e-3)


def test_states_can_be_filled_before_and_the_rest_of_the_backbone_does_not_run() -> None:
    model, images = adapted(), pictures()
    wanted = model(images)
    cached = PrefixCache(model, samples=4, max_bytes=3 * STATE)
    embedded, ended = calls_of(model.patch_embed), calls_of(model.blocks[2])
    full = []
    for keys in ([0, 1], [2, 3]):
        cached.fill(images[keys], keys)
        full.append(cached.full)
    assert (embedded, ended, full, len(cached)) == ([2, 2], [], [False, True], 3)
    assert torch.allclose(cached(images, range(4)), wanted, atol=1e-6)
    assert embedded == [2, 2, 1]


class Cached(Task):
    """Batches bring the number of each picture."""

    def training_loss(self, batch: Any) -> Tensor:
        images, labels, keys = batch
        return F.cross_entropy(self.head(self.features(images, keys)), labels)

    def features(self, images: Tensor, keys: Tensor) -> Tensor:
        return self.backbone(images)  # type: ignore[no-any-return]


def trained(cache: bool) -> tuple[list[int], dict[str, Tensor]]:
    torch.manual_seed(3)
    task = Cached(LoRA(rank=2), "blocks.1.attn.qkv", training_vit(depth=2), lr=0.01)
    if cache:
        task.features = PrefixCache(task.backbone, samples=8)  # type: ignore[method-assign]
    data = TensorDataset(pictures(8), torch.arange(8) % 3, torch.arange(8))
    embedded = calls_of(task.backbone.patch_embed)  # type: ignore[arg-type]
    loader: DataLoader[Any] = epoch_loader(data, 4, seed=0)
    quiet_trainer(max_epochs=3).fit(task, loader)
    return embedded, task.state_dict()


def test_training_gives_the_same_adapters_and_runs_the_prefix_in_the_first_epoch_only() -> None:
    always, plain = trained(cache=False)
    once, found = trained(cache=True)
    assert (always, once) == ([4] * 6, [4] * 2)
    for name, tensor in plain.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name


# What is refused


class Other(VisionTransformer):
    def forward_features(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return super().forward_features(x) + 1


@pytest.mark.parametrize("make", [nn.Identity, Other])
def test_another_backbone_is_refused_by_name(make: type[nn.Module]) -> None:
    with pytest.raises(AdaptError, match=f"cannot be cached for {make.__name__}: only for timm's"):
        PrefixCache(make(), samples=4)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"proj_drop_rate": 0.1}, "Dropout"),
        ({"drop_path_rate": 0.1}, "DropPath"),
        ({"pos_drop_rate": 0.1}, "Dropout"),
        ({"patch_drop_rate": 0.5}, "PatchDropout"),
    ],
)
def test_a_prefix_that_draws_at_random_is_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(AdaptError, match=f"a prefix with {name}.* above 0 cannot be cached"):
        PrefixCache(adapted(**options), samples=4)


def test_running_statistics_in_the_prefix_are_refused() -> None:
    model = adapted()
    model.blocks[0].norm1 = nn.BatchNorm1d(5)
    with pytest.raises(AdaptError, match="a prefix with BatchNorm1d cannot be cached"):
        PrefixCache(model, samples=4)


def test_a_trained_embedding_is_refused() -> None:
    model = vit()
    attach(model, LoRA(rank=2), at="patch_embed.proj")
    with pytest.raises(AdaptError, match=r"set 'default' adapts 'patch_embed.proj': nothing"):
        PrefixCache(model, samples=4)
    tuned = vit()
    attach(tuned, FullFineTuning())
    with pytest.raises(AdaptError, match="nothing before it can be cached"):
        PrefixCache(tuned, samples=4)


def test_a_set_on_an_earlier_block_ends_the_cache() -> None:
    model, images = adapted(), pictures()
    cached = PrefixCache(model, samples=4)
    attach(model, LoRA(rank=2), at="blocks.1.attn.qkv", name="earlier")
    with pytest.raises(AdaptError, match="block 1 was adapted after this cache was made for block"):
        cached(images, range(4))


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        ([0, 1], {}, "2 keys for 4 images"),
        ([0, 1, 2, 4], {}, r"key \[4\] is not one of the 4 samples"),
        ([0, 1, 2, -1], {}, r"key \[-1\] is not one of the 4 samples"),
        (
            [0, 1, 2, 3],
            {"max_bytes": STATE - 1},
            "a bound of 159 bytes holds no state: one is 160 b",
        ),
        ([0, 1, 2, 3], {"folder": "gone"}, "cannot write into gone: No such file"),
        ([0, 1, 2, 3], HUGE, "1000000000000000 bytes, more than the memory has: lower the bound"),
        ([0, 1, 2, 3], {"folder": ".", **HUGE}, r"1000000000000000 bytes, \. has \d+ free"),
    ],
)
def test_bad_requests_are_one_line(keys: list[int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdaptError, match=message):
        PrefixCache(adapted(), **{"samples": 4, **options})(pictures(), keys)
