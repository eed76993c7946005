"""Gated cross-attention: its size, its start, its features, on both Whisper classes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polyadapt.core import (
    AdaptError,
    AdapterSet,
    GatedCrossAttention,
    LoRA,
    activate,
    attach,
    recompute,
    sets_of,
)
from polyadapt.core.adapters.gated_cross_attention import attending
from polyadapt.speech.adapters import load_set
from polyadapt.speech.decoding import Decoding
from polyadapt.speech.flamingo import (
    Projection,
    SeenClips,
    WhisperFlamingo,
    blocks_of,
    projection_of,
    watching,
)
from polyadapt.speech.model import Speech
from polyadapt.speech.names import LAYOUTS, Layout
from polyadapt.tests.avsr_cases import TinyWhisper
from polyadapt.tests.law_table import stir
from polyadapt.tests.speech_models import tiny_speech, tiny_whisper

RECIPE = GatedCrossAttention(head_width=32)
TOKENS = torch.tensor([[50257, 50362, 464, 2068], [50257, 50362, 32, 50256]])


def states(batch: int = 2) -> Tensor:
    return torch.randn(batch, 20, 64, generator=torch.Generator().manual_seed(1))


def features(batch: int = 2, frames: int = 7) -> Tensor:
    return torch.randn(batch, frames, 64, generator=torch.Generator().manual_seed(2))


def adapted(layout: Layout = "openai", stirred: bool = True) -> tuple[Speech, AdapterSet]:
    speech = tiny_speech(layout)
    made = attach(
        speech.model, RECIPE, blocks_of(layout), "lips", generator=torch.Generator().manual_seed(0)
    )
    return speech, stir(made) if stirred else made


@pytest.mark.parametrize(("width", "blocks", "total"), [(768, 12, 85_045_272)])
def test_the_sizes_of_whisper_small_are_the_published_ones(
    width: int, blocks: int, total: int
) -> None:
    from polyadapt.core import Site

    site = Site("decoder.blocks.0", None, None, None, "block", (width,), "output", "a module")
    adapter = GatedCrossAttention().build(site, None, None)
    count = sum(p.numel() for p in adapter.parameters())
    assert count == 7_087_106 == 12 * width**2 + 12 * width + 2
    assert blocks * count == total
    projection = Projection(1024, width)
    assert sum(p.numel() for p in projection.parameters()) == 1024 * width + width + 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_closed_gates_leave_the_decoder_as_it_is(layout: Layout) -> None:
    speech, made = adapted(layout, stirred=False)
    with torch.no_grad(), activate(speech.model, None):
        plain = speech.logits(TOKENS, states())
    with torch.no_grad(), attending(features()):
        assert torch.equal(speech.logits(TOKENS, states()), plain)
    stir(made)
    with torch.no_grad(), attending(features()):
        assert not torch.allclose(speech.logits(TOKENS, states()), plain, atol=1e-2)
    with torch.no_grad(), activate(speech.model, None):
        assert torch.equal(speech.logits(TOKENS, states()), plain)


def test_at_the_start_the_gates_alone_have_a_gradient() -> None:
    speech, made = adapted(stirred=False)
    with attending(features()):
        speech.logits(TOKENS, states()).square().mean().backward()
    for name, adapter in made.adapters.items():
        for inner, parameter in adapter.named_parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == inner.endswith("gate"), f"{name} {inner}"


def test_a_block_s_input_is_the_two_gated_branches() -> None:
    """By hand, with gates at atanh(1/2): x + MHA / 2, then + FFN / 2."""
    _, made = adapted()
    adapter: Any = next(iter(made.adapters.values()))
    x, v = torch.randn(2, 3, 64), features()
    with torch.no_grad():
        adapter.attention_gate.fill_(0.5).atanh_()
        adapter.ffn_gate.fill_(0.5).atanh_()
        normed = adapter.attention_norm(x)
        parts = [
            (adapter.query(normed)[..., h : h + 32], adapter.key(v)[..., h : h + 32])
            for h in (0, 32)
        ]
        weights = [(q @ k.mT / 32**0.5).softmax(-1) for q, k in parts]
        values = adapter.value(v).split(32, dim=-1)
        heads = torch.cat([w @ value for w, value in zip(weights, values, strict=True)], dim=-1)
        first = x + adapter.out(heads) / 2
        hidden = nn.functional.gelu(adapter.up(adapter.ffn_norm(first)))
        with attending(v):
            found = adapter.enter(x)
    assert torch.allclose(found, first + adapter.down(hidden) / 2, atol=1e-5)


def test_the_features_have_no_order_and_a_clock_of_their_own() -> None:
    speech, _ = adapted()
    v = features(frames=7)
    with torch.no_grad():
        found = []
        for given in (v, v.flip(1), v.repeat(1, 3, 1)):
            with attending(given):
                found.append(speech.logits(TOKENS, states()))
    assert torch.allclose(found[0], found[1], atol=1e-4)
    assert torch.allclose(found[0], found[2], atol=1e-4)


def test_padded_features_are_not_seen() -> None:
    speech, _ = adapted()
    v = features()
    padded = torch.cat([v, torch.full((2, 3, 64), 9.0)], dim=1)
    seen = torch.arange(10).expand(2, 10) < 7
    with torch.no_grad(), attending(v):
        wanted = speech.logits(TOKENS, states())
    with torch.no_grad(), attending(padded, seen):
        assert torch.allclose(speech.logits(TOKENS, states()), wanted, atol=1e-4)


# openai-whisper sorts a tensor by NumPy where a path has not ended.
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("beam", [None, 3])
def test_every_path_of_a_beam_looks_at_its_own_clip(layout: Layout, beam: int | None) -> None:
    """A batch says what its clips say alone."""
    speech, _ = adapted(layout)
    asked = Decoding(longest=4, beam=beam)
    with attending(features()):
        together = speech.decode_states(states(), asked)
    for clip in (0, 1):
        with attending(features()[clip : clip + 1]):
            (alone,) = speech.decode_states(states()[clip : clip + 1], asked)
        assert together[clip].tokens == alone.tokens
        assert together[clip].avg_logprob == pytest.approx(alone.avg_logprob, abs=1e-4)
    with attending(features() * 3):
        others = speech.decode_states(states(), asked)
    assert [r.avg_logprob for r in others] != [r.avg_logprob for r in together]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_a_cache_the_decoder_sees_what_it_sees_without(layout: Layout) -> None:
    speech, _ = adapted(layout)
    with torch.no_grad(), attending(features()):
        wanted = speech.logits(TOKENS, states())
        cached = speech.inference(2)
        first = cached.logits(TOKENS[:, :2], states())
        steps = [cached.logits(TOKENS[:, :n], states()) for n in (3, 4)]
        cached.cleanup_caching()
    assert torch.allclose(torch.cat([first, *steps], dim=1), wanted, atol=1e-3)


def test_every_thread_looks_at_its_own_features() -> None:
    speech, _ = adapted()
    both = features(), features(frames=5)
    with torch.no_grad():
        wanted = []
        for v in both:
            with attending(v):
                wanted.append(speech.logits(TOKENS, states()))
    found: dict[int, Tensor] = {}
    ready = threading.Barrier(2)

    def run(number: int) -> None:
        with torch.no_grad(), attending(both[number]):
            ready.wait()
            for _ in range(5):
                found[number] = speech.logits(TOKENS, states())

    threads = [threading.Thread(target=run, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[n], wanted[n]) for n in (0, 1))


def test_contexts_nest_and_end() -> None:
    speech, _ = adapted()
    with torch.no_grad(), attending(features()):
        wanted = speech.logits(TOKENS, states())
        with attending(features(frames=3)):
            assert not torch.equal(speech.logits(TOKENS, states()), wanted)
        assert torch.equal(speech.logits(TOKENS, states()), wanted)
    with pytest.raises(AdaptError, match=r"decoder.blocks.0 looks at features"):
        speech.logits(TOKENS, states())


def test_a_compiled_decoder_looks_at_what_the_context_says() -> None:
    """The context is opened outside: torch cannot compile one, so the law table leaves this out."""
    block = nn.Sequential(nn.Linear(8, 8))
    stir(attach(nn.Sequential(block), GatedCrossAttention(head_width=4), "0"))
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    x = torch.randn(2, 3, 8)
    for v in (torch.randn(2, 4, 8), torch.randn(2, 4, 8)):
        with attending(v):
            assert torch.allclose(compiled(x), block(x), atol=1e-6)
    torch.compiler.reset()


def test_a_mixed_batch_has_the_sets_of_its_samples() -> None:
    speech, _ = adapted()
    with torch.no_grad(), attending(features()):
        seeing = speech.logits(TOKENS, states())
    with torch.no_grad(), activate(speech.model, None):
        plain = speech.logits(TOKENS, states())
    per_sample = activate(speech.model, per_sample=["lips", None])
    with torch.no_grad(), per_sample, attending(features()):
        mixed = speech.logits(TOKENS, states())
    assert torch.equal(mixed[0], seeing[0])
    assert torch.equal(mixed[1], plain[1])


@pytest.mark.parametrize("inside", [True, False])
def test_a_forward_that_is_recomputed_asks_for_the_features_again(inside: bool) -> None:
    speech, made = adapted()
    block: Any = speech.model.get_submodule("decoder.blocks.0")
    x = torch.randn(2, 4, 64, requires_grad=True)
    with attending(features()):
        loss = checkpoint(block, x, states(), use_reentrant=False).square().sum()
    if inside:
        with attending(features()):
            loss.backward()
        gates = [p.grad for n, p in made.named_parameters() if "gate" in n and ".0." in n]
        assert all(grad is not None and bool(grad.any()) for grad in gates)
    else:
        with pytest.raises(AdaptError, match="looks at features"):
            loss.backward()


def test_recompute_gives_a_block_the_same_features_again() -> None:
    """Backward runs outside of the context, as Lightning's does."""
    kept = []
    for mode in ("none", "cheap"):
        speech, made = adapted()
        with recompute(speech.model, mode), attending(features()):
            loss = speech.logits(TOKENS, states()).square().mean()
        loss.backward()
        kept.append([p.grad for p in made.parameters() if p.grad is not None])
    assert len(kept[0]) == len(kept[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: attending(torch.zeros(7, 64)), r"\[batch, frames, width\], not \[7, 64\]"),
        (lambda: attending(torch.zeros(1, 0, 64)), r"not \[1, 0, 64\]"),
        (lambda: attending(torch.zeros(1, 7, 64), torch.zeros(1, 7)), "something is seen"),
        (lambda: attending(torch.zeros(1, 7, 64), torch.ones(1, 6)), r"expected \[1, 7\]"),
        (lambda: attending(torch.zeros(3, 7, 64)), r"\[2, 4, 64\], to look at features \[3, 7"),
        (lambda: attending(torch.zeros(2, 7, 63)), r"to look at features \[2, 7, 63\]"),
        (lambda: nullcontext(), "looks at features: call the model within"),
    ],
)
def test_features_that_do_not_fit_are_refused(call: Callable[[], Any], words: str) -> None:
    speech, _ = adapted()
    with pytest.raises(AdaptError, match=words) as refusal, call():
        speech.logits(TOKENS, states())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("recipe", "at", "words"),
    [
        (GatedCrossAttention(head_width=48), "decoder.blocks.0", "48 do not divide"),
        (RECIPE, "decoder.blocks.0.mlp.0", "is a linear"),
    ],
)
def test_sites_that_do_not_fit_are_refused(
    recipe: GatedCrossAttention, at: str, words: str
) -> None:
    model = tiny_whisper()
    with pytest.raises(AdaptError, match=words):
        attach(model, recipe, at)
    assert sets_of(model) == {}


@pytest.mark.parametrize("width", [0, 1.5, True])
def test_a_head_has_a_whole_number_of_channels(width: Any) -> None:
    with pytest.raises(AdaptError, match="head_width"):
        GatedCrossAttention(head_width=width)


def _batch() -> SeenClips:
    return SeenClips(
        mel=torch.randn(2, 80, 40),
        video=torch.randn(2, 7, 12),
        inputs=TOKENS,
        targets=torch.tensor([[-100, 464, 2068, 50256], [-100, 32, 50256, -100]]),
    )


def test_a_step_trains_gates_and_projection_and_nothing_of_whisper(tmp_path: Path) -> None:
    """The file then brings set and projection to the other Whisper class."""
    task = WhisperFlamingo(TinyWhisper(), 12, RECIPE, seed=0)
    assert torch.equal(task.projection.scale, torch.ones(1))
    stir(task.adapters)
    task.training_loss(_batch()).backward()
    trained = {n for n, p in task.named_parameters() if p.grad is not None}
    own = {n for n in trained if "polyadapt_drawer" not in n}
    assert own == {"projection.linear.weight", "projection.linear.bias", "projection.scale"}
    assert all(p.grad is not None for p in task.adapters.parameters())
    task.save_adapter(tmp_path / "lips.safetensors")

    batch = _batch()
    with torch.no_grad():
        heard = task.speech.encode(batch.mel)
        with watching(task.projection, batch.video):
            wanted = task.speech.logits(TOKENS, heard)
    speech = tiny_speech("transformers")
    made = load_set(speech, tmp_path / "lips.safetensors")
    projection = projection_of(made)
    with torch.no_grad(), watching(projection, batch.video):
        found = speech.logits(TOKENS, speech.encode(batch.mel))
    assert torch.allclose(found, wanted, atol=1e-3)
    with pytest.raises(AdaptError, match=r"expected \[b, f, 12\]"):
        projection(torch.zeros(2, 7, 13))


def test_another_set_has_no_projection() -> None:
    made = attach(tiny_whisper(), LoRA(rank=2), "encoder.blocks.0.attn.query")
    with pytest.raises(AdaptError, match="no set of Whisper-Flamingo"):
        projection_of(made)
