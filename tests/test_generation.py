"""Adapters in decoding: key-value caches, generate, mixed batches; whisper and GPT-2, tiny."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import AdaptError, Bottleneck, FullFineTuning, LoRA, activate, attach
from polyadapt.core.errors import SiteError
from polyadapt.tests.law_real_models import OTHERS, mel, transformers_whisper, words
from polyadapt.tests.law_table import stir

pytestmark = pytest.mark.slow  # importing whisper and transformers takes seconds

STEPS = 6
LORA = LoRA(rank=2, alpha=4)
CACHED = "decoder.blocks.*.{attn,cross_attn}.{query,key,value}"


def _whisper() -> Any:
    return OTHERS["openai Whisper"].model()


@torch.no_grad()
def _greedy(model: Any, cache: dict[Any, Tensor] | None) -> Tensor:
    """Token numbers and the last logits, with a key-value cache or by full recomputation."""
    audio = model.encoder(mel())
    tokens = words()[:, :2]
    for _ in range(STEPS):
        given = tokens if cache is None or tokens.shape[1] == 2 else tokens[:, -1:]
        logits = model.decoder(given, audio, kv_cache=cache)[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return torch.cat([tokens, logits], 1)


@pytest.fixture(params=["cache before attach", "cache after attach"])
def cached(request: pytest.FixtureRequest) -> Iterator[tuple[Any, dict[Any, Tensor]]]:
    """A whisper with a set, and the cache that its hooks fill."""
    model = _whisper()
    before = request.param == "cache before attach"
    cache, hooks = model.install_kv_cache_hooks() if before else ({}, [])
    stir(attach(model, LORA, at=CACHED, name="a", generator=torch.Generator().manual_seed(1)))
    if not before:
        cache, hooks = model.install_kv_cache_hooks()
    yield model, cache
    for hook in hooks:
        hook.remove()


def test_cached_decoding_equals_recomputation(cached: tuple[Any, dict[Any, Tensor]]) -> None:
    model, cache = cached
    with_cache = _greedy(model, cache)
    plain = _whisper()
    stir(attach(plain, LORA, at=CACHED, generator=torch.Generator().manual_seed(1)))
    assert torch.allclose(with_cache, _greedy(plain, None), atol=1e-4)
    assert len(cache) == 8  # key and value of two attentions in two blocks
    with activate(plain, None):
        assert not torch.allclose(with_cache, _greedy(plain, None), atol=1e-2)


def test_the_cache_of_the_untouched_backbone_is_bitwise_its_own(
    cached: tuple[Any, dict[Any, Tensor]],
) -> None:
    model, cache = cached
    with activate(model, None):
        found = _greedy(model, cache)
    bare = _whisper()
    own, _ = bare.install_kv_cache_hooks()
    assert torch.equal(found, _greedy(bare, own))


def test_a_cached_mixed_batch_decodes_each_sample_under_its_set(
    cached: tuple[Any, dict[Any, Tensor]],
) -> None:
    model, cache = cached
    with activate(model, per_sample=["a", None, "a"]):
        mixed = _greedy(model, cache)
    plain = _whisper()
    stir(attach(plain, LORA, at=CACHED, name="a", generator=torch.Generator().manual_seed(1)))
    adapted = _greedy(plain, None)
    with activate(plain, None):
        bare = _greedy(plain, None)
    assert torch.allclose(mixed, torch.stack([adapted[0], bare[1], adapted[2]]), atol=1e-4)


def test_a_decoder_with_a_cache_is_not_run_twice_for_a_mixed_batch() -> None:
    model = _whisper()
    attach(model, LORA, at="decoder.token_embedding", name="a")  # its weight makes the logits too
    cache, hooks = model.install_kv_cache_hooks()
    refused = pytest.raises(AdaptError, match="TextDecoder keeps state between calls")
    with refused, activate(model, per_sample=["a", None, None]):
        _greedy(model, cache)
    for hook in hooks:
        hook.remove()


def test_the_embedding_that_makes_the_logits_is_adapted_in_both_places() -> None:
    model = _whisper()
    adapters = stir(attach(model, LORA, at="decoder.token_embedding"))
    (site,) = adapters.sites
    assert (site.slot, site.why) == ("weight", "TextDecoder reads token_embedding.weight itself")
    y = _greedy(model, None)
    adapters.merge()
    assert torch.allclose(_greedy(model, None), y, atol=1e-4)


# transformers' generate


def _generated(model: Any, cached: bool) -> Tensor:
    inputs = {"input_ids": words()}
    if "Whisper" in type(model).__name__:
        inputs = {"input_features": mel()}
    out: Tensor = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, use_cache=cached, eos_token_id=99
    )
    return out


@pytest.mark.parametrize(
    ("recipe", "at"),
    [
        (LORA, "**.h.*.attn.c_attn[q,v]"),
        (LORA, "transformer.wpe"),
        (FullFineTuning(), "transformer.h.*.mlp.c_fc.weight"),
        (Bottleneck(rank=2), "transformer.h.*"),
        (Bottleneck(rank=2, placement="parallel_ffn"), "transformer.h.*"),
    ],
    ids=str,
)
def test_gpt2_generates_the_same_with_and_without_its_cache(recipe: Any, at: str) -> None:
    model = OTHERS["GPT-2 with head"].model()
    base = _generated(model, True)
    adapters = attach(model, recipe, at=at)
    assert torch.equal(_generated(model, True), base)
    with torch.no_grad():
        for parameter in adapters.parameters():  # strong enough to change the greedy choice
            parameter.add_(torch.randn(parameter.shape))
    adapted = _generated(model, True)
    assert torch.equal(adapted, _generated(model, False))
    assert not torch.equal(adapted, base)
    with activate(model, None):
        assert torch.equal(_generated(model, True), base)


def test_whisper_of_transformers_generates_under_a_set() -> None:
    model = OTHERS["transformers Whisper"].model()
    base = _generated(model, True)
    at = ["**.{q_proj,v_proj}", "model.decoder.embed_positions"]
    adapters = attach(model, LORA, at=at)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn(parameter.shape))
    adapted = _generated(model, True)
    assert torch.equal(adapted, _generated(model, False))
    assert not torch.equal(adapted, base)
    adapters.merge()
    assert torch.equal(_generated(model, True), adapted)


@pytest.mark.parametrize(
    ("make", "at", "names"),
    [
        (OTHERS["GPT-2 with head"].model, "lm_head", "transformer.wte.weight and lm_head.weight"),
        (OTHERS["GPT-2 with head"].model, "**.wte", "transformer.wte.weight and lm_head.weight"),
        (transformers_whisper, "proj_out", "embed_tokens.weight and proj_out.weight"),
    ],
    ids=["lm_head", "wte", "proj_out"],
)
def test_a_tied_head_is_refused_by_both_names(make: Any, at: str, names: str) -> None:
    model: nn.Module = make()
    with pytest.raises(SiteError, match=f"is tied: .*{names}"):
        attach(model, LORA, at=at)
