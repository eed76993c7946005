"""Splitting q, k and v of open_clip's towers: the same numbers, called one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import LoRA, attach
from polyadapt.core.errors import AdaptError
from polyadapt.tests.vlm_models import (
    KINDS,
    WIDTH,
    clip,
    custom_text_clip,
    images,
    normed_clip,
    size_of,
    tokens,
)
from polyadapt.vlm.model import image_text_of
from polyadapt.vlm.names import sites_for
from polyadapt.vlm.split import SplitAttention, joined_attention, split_attention

pytestmark = pytest.mark.slow

B, N, D, HEADS = 2, 5, 12, 3
CAUSAL = torch.full((N, N), -torch.inf).triu(1)
MASKS: dict[str, Tensor | None] = {
    "no mask, as in vision": None,
    "a causal mask, as in text": CAUSAL,
    "True where nothing is seen": CAUSAL < 0,
    "one mask per sample and head": CAUSAL
    + torch.arange(B * HEADS * N, dtype=torch.float32).view(B * HEADS, 1, N) / 9,
}


def _attention(dropout: float = 0.0, **options: bool) -> nn.MultiheadAttention:
    torch.manual_seed(2)
    made = nn.MultiheadAttention(D, HEADS, dropout, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made.eval()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_split_attention_is_multihead_attention(
    mask: Tensor | None, bias: bool, batch_first: bool
) -> None:
    # In fp64: results of 6 differ by more than 1e-6 between two orders of an fp32 sum.
    whole = _attention(bias=bias, batch_first=batch_first).double()
    x = torch.randn(B, N, D) if batch_first else torch.randn(N, B, D)
    x, mask = x.double(), mask.double() if mask is not None and mask.is_floating_point() else mask
    expected = whole(x, x, x, need_weights=False, attn_mask=mask)[0]
    found, weights = SplitAttention(whole)(x, x, x, need_weights=False, attn_mask=mask)
    assert (found - expected).abs().max() < 1e-12
    assert weights is None


def test_keys_and_values_may_come_from_elsewhere() -> None:
    whole = _attention(batch_first=True)
    x, y = torch.randn(B, N, D), torch.randn(B, 7, D)
    expected = whole(x, y, 2 * y, need_weights=False)[0]
    torch.testing.assert_close(SplitAttention(whole)(x, y, 2 * y)[0], expected)


def test_the_dropout_of_the_attentions_weights_stays() -> None:
    whole = _attention(dropout=0.5, batch_first=True)
    split = SplitAttention(copy.deepcopy(whole))
    x = torch.randn(B, N, D)
    found = []
    for attention in (whole.train(), split.train()):
        torch.manual_seed(3)
        found.append(attention(x, x, x, need_weights=False)[0])
    torch.testing.assert_close(found[0], found[1])
    assert not torch.equal(found[1], split.eval()(x, x, x)[0])


def test_the_layers_hold_the_very_numbers_of_the_in_projection() -> None:
    whole = _attention()
    start, size = whole.in_proj_weight.data_ptr(), D * D * 4
    split = SplitAttention(whole)
    assert [layer.weight.data_ptr() - start for layer in (split.q_proj, split.k_proj)] == [0, size]
    assert split.v_proj.weight.data_ptr() - start == 2 * size
    assert len(list(split.parameters())) == 8  # four layers; the in-projection is no fifth


@pytest.mark.parametrize("make", [clip, normed_clip, custom_text_clip])
def test_a_split_tower_gives_the_features_of_before(make: Callable[[], nn.Module]) -> None:
    model = image_text_of(make())
    with torch.no_grad():
        before = model.image_features(images()), model.text_features(tokens())
        assert len(split_attention(model.model)) == 4
        after = model.image_features(images()), model.text_features(tokens())
    for old, new in zip(before, after, strict=True):
        assert (new - old).abs().max() < 1e-6


def test_split_text_sees_a_mask_of_its_padding() -> None:
    """open_clip makes one mask per sample and head of it."""
    model = image_text_of(custom_text_clip(embed_cls=True))
    with torch.no_grad():
        before = model.text_features(tokens())
        split_attention(model.model)
        torch.testing.assert_close(model.text_features(tokens()), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["CustomTextCLIP of timm and BERT", "transformers SigLIP"])
def test_attention_that_calls_its_projections_is_left_alone(kind: str) -> None:
    assert size_of(kind)
    model = KINDS[kind]()
    names = list(model.state_dict())
    assert split_attention(model) == ()
    assert list(model.state_dict()) == names


def test_poolers_and_attention_across_towers_are_left_alone() -> None:
    from open_clip.transformer import MultimodalTransformer

    pooling = clip(attentional_pool=True, attn_pooler_queries=2, attn_pooler_heads=2)
    assert all("pool" not in path for path in split_attention(pooling))
    reader = MultimodalTransformer(12, 2, 2, context_length=4, output_dim=WIDTH)
    assert split_attention(reader) == ("resblocks.0.attn", "resblocks.1.attn")


@pytest.mark.parametrize("make", [clip, normed_clip])
def test_joining_gives_back_classes_names_and_bits(make: Callable[[], nn.Module]) -> None:
    model = make()
    classes = [type(module) for module in model.modules()]
    before = _tensors(model)
    paths = split_attention(model)
    assert "visual.transformer.resblocks.0.attn.q_proj.weight" in model.state_dict()
    assert joined_attention(model) == paths
    assert [type(module) for module in model.modules()] == classes
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert joined_attention(model) == ()


def test_a_split_model_can_be_copied_cast_and_trained_before_it_is_joined() -> None:
    model = clip()
    split_attention(model)
    twin = copy.deepcopy(model).double().train()
    assert isinstance(twin, nn.Module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    joined_attention(twin)
    joined_attention(model)
    here, there = model.state_dict(), twin.state_dict()
    assert all(torch.equal(2 * here[name].double(), there[name]) for name in here)
    attention = twin.get_submodule("transformer.resblocks.1.attn")
    assert attention.training
    assert attention.in_proj_weight.requires_grad


def test_splitting_and_joining_wait_until_no_set_is_attached() -> None:
    model = clip()
    made = attach(model, LoRA(rank=2), sites_for(model), "pets")
    with pytest.raises(
        AdaptError, match=r"split before sets are attached: detach \['pets'\] first"
    ):
        split_attention(model)
    made.detach()
    split_attention(model)
    made = attach(model, LoRA(rank=2), sites_for(model), "pets")
    with pytest.raises(AdaptError, match="joined before sets are attached"):
        joined_attention(model)


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(AdaptError, match="scaled cosine attention"):
        split_attention(clip(scaled_cosine_attn=True))
    model = clip()
    attention: Any = model.get_submodule("visual.transformer.resblocks.1.attn")
    attention.add_zero_attn = True
    before = list(model.state_dict())
    with pytest.raises(AdaptError, match="keys of its own"):
        split_attention(model)
    assert list(model.state_dict()) == before  # the first block, too
    x = torch.randn(1, 2, D)
    with pytest.raises(AdaptError, match="need_weights=False"):
        SplitAttention(_attention())(x, x, x, need_weights=True)
