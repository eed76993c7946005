"""Both Whisper classes behind one interface, with adapters in every way of using them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from polyadapt.core import AdapterSet, LoRA, activate, attach, switch
from polyadapt.core.errors import AdaptError
from polyadapt.speech.decoding import Decoding
from polyadapt.speech.model import Speech, speech_of
from polyadapt.speech.names import Layout, sites_for
from polyadapt.speech.tokens import Prompt
from polyadapt.tests.law_table import stir
from polyadapt.tests.speech_models import MULTILINGUAL, tiny_speech, tiny_whisper

LAYOUTS: list[Layout] = ["openai", "transformers"]
in_both = pytest.mark.parametrize("layout", LAYOUTS)
SHORT = 100  # frames


def _mel(batch: int = 2, frames: int = SHORT) -> Tensor:
    return torch.randn(batch, 80, frames, generator=torch.Generator().manual_seed(1))


def _adapted(layout: Layout, stirred: bool = True) -> tuple[Speech, AdapterSet]:
    speech = tiny_speech(layout)
    at, own = sites_for(layout, "linear"), torch.Generator().manual_seed(2)
    made = attach(speech.model, LoRA(rank=4), at=at, name="a", generator=own)
    return speech, stir(made) if stirred else made


def _stock(speech: Speech, mel: Tensor) -> Tensor:
    """The encoder of the class itself."""
    model: Any = speech.model
    if speech.layout == "openai":
        return model.encoder(mel)  # type: ignore[no-any-return]
    return model.model.encoder(mel).last_hidden_state  # type: ignore[no-any-return]


@in_both
@pytest.mark.parametrize("stirred", [False, True])
@torch.no_grad()
def test_3000_frames_give_the_bits_of_the_stock_encoder(layout: Layout, stirred: bool) -> None:
    speech, _ = _adapted(layout, stirred)
    mel = _mel(1, 3000)
    wanted = _stock(speech, mel)
    assert torch.equal(speech.encode(mel), wanted)


@in_both
@torch.no_grad()
def test_the_forward_of_a_short_context_gives_the_same_bits_at_3000_frames(
    layout: Layout,
) -> None:
    speech, _ = _adapted(layout)
    mel = _mel(1, 3000)
    assert torch.equal(speech._encode(mel, whole=False), _stock(speech, mel))


@in_both
@torch.no_grad()
def test_a_thousand_frames_give_500_positions_and_a_short_context_is_adapted(
    layout: Layout,
) -> None:
    speech, _ = _adapted(layout)
    assert speech.encode(_mel(1, 1000)).shape == (1, 500, 64)
    adapted = speech.encode(_mel())
    assert adapted.shape == (2, SHORT // 2, 64)
    with activate(speech.model, None):
        assert float((speech.encode(_mel()) - adapted).abs().max()) > 0.1


@torch.no_grad()
def test_both_layouts_hear_the_same_in_a_short_context() -> None:
    one, other = (tiny_speech(layout).encode(_mel()) for layout in LAYOUTS)
    assert torch.allclose(one, other, atol=1e-5 * float(one.abs().max()))


@in_both
def test_gradients_reach_the_encoders_adapters_in_a_short_context(layout: Layout) -> None:
    speech, made = _adapted(layout)
    speech.encode(_mel()).square().mean().backward()
    inside = [p for name, p in made.trained().items() if "encoder." in name.split("/")[0]]
    assert len(inside) == 2 * 12
    assert all(p.grad is not None and bool(p.grad.any()) for p in inside)


@in_both
@pytest.mark.parametrize(
    "shape", [(1, 80, 101), (1, 80, 3002), (1, 80, 0), (1, 64, 100), (80, 100)]
)
def test_other_shapes_of_spectrograms_are_refused(layout: Layout, shape: tuple[int, ...]) -> None:
    with pytest.raises(AdaptError, match=r"frames are an even number|spectrograms are \[b, 80"):
        tiny_speech(layout).encode(torch.zeros(shape))


@in_both
@torch.no_grad()
def test_a_fresh_set_changes_no_bit_and_no_greedy_token(layout: Layout) -> None:
    base, (fresh, _) = tiny_speech(layout), _adapted(layout, stirred=False)
    tokens = torch.tensor([[50257, 50362, 843, 523]])
    states = base.encode(_mel(1))
    assert torch.equal(fresh.encode(_mel(1)), states)
    assert torch.equal(fresh.logits(tokens, states), base.logits(tokens, states))
    few = Decoding(longest=8)
    assert fresh.decode(_mel(1), few)[0].tokens == base.decode(_mel(1), few)[0].tokens


@in_both
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_sequence(layout: Layout, beams: int) -> None:
    speech, _ = _adapted(layout)
    states = speech.encode(_mel(1)).repeat_interleave(beams, 0)
    tokens = torch.randint(0, 50000, (beams, 6), generator=torch.Generator().manual_seed(2))
    inference = speech.inference(2)
    try:
        steps = [inference.logits(tokens[:, :2], states)[:, -1]]
        steps += [inference.logits(tokens[:, : n + 1], states)[:, -1] for n in range(2, 4)]
        order = [2, 0, 0] if beams == 3 else [0]  # paths of a beam are copied and dropped
        inference.rearrange_kv_cache(order)
        tokens = tokens[order]
        late = [inference.logits(tokens[:, : n + 1], states)[:, -1] for n in range(4, 6)]
    finally:
        inference.cleanup_caching()
    whole = speech.logits(tokens, states)
    assert torch.allclose(torch.stack(late, 1), whole[:, 4:], atol=1e-4)
    assert torch.allclose(torch.stack(steps, 1)[order], whole[:, 1:4], atol=1e-4)


@torch.no_grad()
def test_both_layouts_decode_the_same_tokens_with_the_same_adapters() -> None:
    few = [Decoding(longest=6), Decoding(longest=6, beam=3), Decoding(longest=6, timestamps=True)]
    found = []
    for layout in LAYOUTS:
        speech, made = _adapted(layout, stirred=False)
        generator = torch.Generator().manual_seed(3)
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        found.append([[r.tokens for r in speech.decode(_mel(), asked)] for asked in few])
    assert found[0] == found[1]
    assert all(tokens for results in found[0] for tokens in results)


@in_both
@pytest.mark.parametrize("asked", [Decoding(longest=5), Decoding(longest=5, beam=3)])
@torch.no_grad()
def test_a_batch_decodes_as_its_clips_do_one_by_one(layout: Layout, asked: Decoding) -> None:
    speech, _ = _adapted(layout)
    mel = _mel(3) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]  # so that they say other things
    together = [result.tokens for result in speech.decode(mel, asked)]
    assert together == [speech.decode(mel[i : i + 1], asked)[0].tokens for i in range(3)]
    assert len({*map(tuple, together)}) > 1


@in_both
@torch.no_grad()
def test_a_batch_may_mix_sets_in_greedy_decoding(layout: Layout) -> None:
    speech, _ = _adapted(layout)
    few, mel = Decoding(longest=4), _mel(1).repeat(3, 1, 1)
    switch(speech.model, None)
    with activate(speech.model, per_sample=["a", None, "a"]):
        mixed = [result.tokens for result in speech.decode(mel, few)]
    with activate(speech.model, "a"):
        adapted = speech.decode(mel[:1], few)[0].tokens
    base = speech.decode(mel[:1], few)[0].tokens
    assert mixed == [adapted, base, adapted]
    assert adapted != base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_spectrograms_stay_half_with_adapters_on_every_module(
    dtype: torch.dtype,
) -> None:
    speech, _ = _adapted("openai")
    seen: list[torch.dtype] = []
    watched: Callable[..., None] = lambda m, a, out: seen.append(out.dtype)  # noqa: E731
    for module in speech.model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm | torch.nn.Conv1d):
            module.register_forward_hook(watched)
    states = speech.encode(_mel(1, 20).to(dtype))
    assert states.dtype == dtype
    speech.logits(torch.tensor([[50257, 50362]]), states)
    assert len(seen) == 2 + 2 * 8 + 1 + 2 * 13 + 1  # convolutions, blocks, last norms
    assert {*seen} == {dtype}


@torch.no_grad()
def test_transformers_computes_in_the_dtype_of_its_weights() -> None:
    speech = tiny_speech("transformers")
    assert speech.encode(_mel(1, 20).bfloat16()).dtype == torch.float32
    speech.model.to(torch.bfloat16)
    states = speech.encode(_mel(1, 20))
    assert states.dtype == torch.bfloat16
    assert speech.logits(torch.tensor([[50257]]), states).dtype == torch.float32


def test_half_precision_weights_of_openai_are_refused_with_the_mend() -> None:
    with pytest.raises(AdaptError, match=r"keeps float32 weights.*do not call \.half\(\)"):
        speech_of(tiny_whisper().half())


@in_both
@torch.no_grad()
def test_the_classes_own_generation_is_adapted_too(layout: Layout) -> None:
    speech, _ = _adapted(layout)
    mel = _mel(1, 3000)
    mine = speech.decode(mel, Decoding(language="en", longest=6))[0].tokens
    assert max(mine) < 50256  # no timestamp by chance, at which transformers cuts
    model: Any = speech.model
    if layout == "openai":
        from whisper.decoding import DecodingOptions

        options = DecodingOptions(language="en", without_timestamps=True, sample_len=6, fp16=False)
        assert model.decode(mel, options)[0].tokens == mine
    else:
        found = model.generate(mel, max_new_tokens=6, do_sample=False)
        assert found[0].tolist()[-len(mine) :] == mine


@in_both
@torch.no_grad()
def test_a_multilingual_model_hears_the_language_or_is_told(layout: Layout) -> None:
    speech = tiny_speech(layout, MULTILINGUAL)
    assert speech.multilingual
    assert not tiny_speech(layout).multilingual
    heard = speech.decode(_mel(), Decoding(longest=3))
    told = speech.decode(_mel(), Decoding(longest=3, language="German"))
    assert [r.language for r in told] == ["de", "de"]
    again = speech.decode(_mel(), Decoding(longest=3, language=heard[0].language))
    assert again[0].tokens == heard[0].tokens


@in_both
def test_what_a_model_cannot_decode_is_refused_by_name(layout: Layout) -> None:
    speech = tiny_speech(layout)
    with pytest.raises(AdaptError, match="English-only"):
        speech.decode(_mel(1), Decoding(language="fr"))
    with pytest.raises(AdaptError, match="cannot translate"):
        speech.decode(_mel(1), Decoding(task="translate"))
    for wrong in ({"beam": 0}, {"beam": 2, "temperature": 0.5}, {"longest": 0}):
        with pytest.raises(AdaptError, match="at least"):
            Decoding(**wrong)


@in_both
def test_tokens_are_those_of_the_models_vocabulary(layout: Layout) -> None:
    assert tiny_speech(layout).tokens().prompt == (50257, 50362)
    speech = tiny_speech(layout, MULTILINGUAL)
    assert speech.tokens(Prompt(language="zh")).prompt == (50258, 50260, 50359, 50363)
