"""Prompts without their padding: the same features and gradients, from fewer tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polyadapt.core import LoRA, attach
from polyadapt.core.errors import AdaptError
from polyadapt.tests.vlm_models import (
    CONTEXT,
    KINDS,
    clip,
    custom_text_clip,
    tokens,
    transformers_clip,
)
from polyadapt.vlm.model import ImageText, image_text_of
from polyadapt.vlm.names import sites_for
from polyadapt.vlm.split import split_attention
from polyadapt.vlm.text_features import TextFeatures

LONGEST = 5  # of tokens(): texts of 3, 4 and 5 tokens
CUT = {"CLIP", "CLIP, open_clip's attention", "CustomTextCLIP", "transformers CLIP"}
CUT |= {"CustomTextCLIP of timm and BERT"}


def gradients(pair: ImageText, read: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Features, and the gradients of all that makes them."""
    pair.model.zero_grad()
    features = pair.text_features(read)
    goal = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features * goal).sum().backward()
    named = pair.model.named_parameters()
    return features.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_gradients_are_those_of_the_whole_context(kind: str) -> None:
    pair = image_text_of(KINDS[kind]())
    read = pair.shorter(tokens())
    assert read.shape == (3, LONGEST if kind in CUT else CONTEXT)
    (whole, all_of_them), (ours, found) = (gradients(pair, each) for each in (tokens(), read))
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-6)
    assert found.keys() == all_of_them.keys()
    assert len(found) > 10
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, all_of_them[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"no_causal_mask": True}, {"pool_type": "last"}])
def test_a_tower_that_looks_behind_the_end_keeps_its_padding(options: dict[str, Any]) -> None:
    pair = image_text_of(custom_text_clip(**options))
    assert pair.shorter(tokens()) is not None
    assert pair.shorter(tokens()).shape == (3, CONTEXT)
    with pytest.raises(AdaptError, match=r"tokens are \[t, 8\], not \[3, 5\]"):
        pair.text_features(tokens()[:, :LONGEST])


def test_an_adapted_tower_and_its_chunks_read_short_texts_alike() -> None:
    pair = image_text_of(clip())
    made = attach(pair.model, LoRA(rank=2), at=sites_for(pair.model, "text"))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    whole, all_of_them = gradients(pair, tokens())
    texts = TextFeatures(pair, tokens(), chunk=2)
    assert texts.tokens.shape == (3, LONGEST)
    with torch.no_grad():
        torch.testing.assert_close(texts(), whole, rtol=0, atol=1e-6)
    _, found = gradients(pair, texts.tokens)
    assert len(found) == len([*made.parameters()]) == 12
    for name, gradient in found.items():
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(gradient, all_of_them[name], rtol=1e-5, atol=1e-6)


def test_the_end_of_an_old_checkpoint_of_transformers_is_the_largest_token() -> None:
    pair: Any = image_text_of(transformers_clip())
    pair.end = 2
    assert pair.shorter(tokens()).shape == (3, LONGEST)
    pair.end = 19  # the same token by its name
    assert pair.shorter(tokens()).shape == (3, LONGEST)
    assert pair.shorter(tokens()[:1]).shape == (1, 3)


def test_short_texts_are_one_graph() -> None:
    model = clip()
    split_attention(model)
    pair = image_text_of(model)
    attach(model, LoRA(rank=2), at=sites_for(model, "text"))
    compiled = torch.compile(pair.text_features, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(pair.shorter(tokens()))
        torch.testing.assert_close(found, pair.text_features(tokens()), rtol=0, atol=1e-6)
