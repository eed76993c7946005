"""One table of names: weights and sets go from one Whisper class to the other and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import IA3, BitFit, LoRA, Recipe, S2LoRA, activate, attach, load, select
from polyadapt.core.compact import compact
from polyadapt.core.errors import AdaptError, StoreError
from polyadapt.core.store import save_form
from polyadapt.speech.adapters import load_set
from polyadapt.speech.convert import as_openai, as_transformers
from polyadapt.speech.model import Speech, speech_of
from polyadapt.speech.names import Layout, sites_for, to_openai, to_transformers
from polyadapt.tests.law_table import stir
from polyadapt.tests.speech_models import MULTILINGUAL, tiny_speech, tiny_whisper

BOTH: list[tuple[Layout, Layout]] = [("openai", "transformers"), ("transformers", "openai")]
both_ways = pytest.mark.parametrize(("here", "there"), BOTH)


def _logits(speech: Speech, frames: int = 100) -> Tensor:
    mel = torch.randn(2, 80, frames, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[50257, 50362, 843, 523], [50257, 50362, 11, 9]])
    with torch.no_grad():
        return speech.logits(tokens, speech.encode(mel))


def _agree(found: Tensor, wanted: Tensor) -> bool:
    """To 1e-5 of the largest logit."""
    return float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_every_weight_of_openai_has_a_name_in_transformers_and_back() -> None:
    model = tiny_whisper()
    theirs = as_transformers(model).state_dict()
    ours = list(model.state_dict())
    assert {to_transformers(name) for name in ours} == theirs.keys() - {"proj_out.weight"}
    assert [to_openai(to_transformers(name)) for name in ours] == ours


@pytest.mark.parametrize(
    ("openai", "transformers"),
    [
        ("encoder", "model.encoder"),
        ("decoder.blocks", "model.decoder.layers"),
        ("encoder.blocks.3", "model.encoder.layers.3"),
        ("decoder.blocks.0.cross_attn", "model.decoder.layers.0.encoder_attn"),
        ("encoder.blocks.11.attn.key", "model.encoder.layers.11.self_attn.k_proj"),
        ("encoder.blocks.1.mlp.0.weight", "model.encoder.layers.1.fc1.weight"),
        ("decoder.blocks.1.mlp.2", "model.decoder.layers.1.fc2"),
        ("decoder.blocks.1.mlp_ln.bias", "model.decoder.layers.1.final_layer_norm.bias"),
        ("encoder.ln_post", "model.encoder.layer_norm"),
        ("decoder.ln.weight", "model.decoder.layer_norm.weight"),
        ("decoder.token_embedding", "model.decoder.embed_tokens"),
        ("decoder.positional_embedding", "model.decoder.embed_positions.weight"),
    ],
)
def test_a_path_has_one_name_in_each_layout(openai: str, transformers: str) -> None:
    assert to_transformers(openai) == transformers
    assert to_openai(transformers) == openai


@pytest.mark.parametrize(
    "path", ["proj_out", "proj_out.weight", "model.encoder.layers.0.fc3", "vision.layers.0", ""]
)
def test_a_path_without_a_counterpart_is_refused(path: str) -> None:
    with pytest.raises(AdaptError, match="has no counterpart in the openai layout"):
        to_openai(path)


@pytest.mark.parametrize("n_vocab", [51864, MULTILINGUAL])
def test_the_same_weights_give_the_same_logits_in_both_layouts(n_vocab: int) -> None:
    one, other = (tiny_speech(layout, n_vocab) for layout in ("openai", "transformers"))
    for frames in (3000, 100):
        wanted = _logits(one, frames)
        assert float(wanted.abs().max()) > 1
        assert _agree(_logits(other, frames), wanted)


def test_converting_there_and_back_gives_the_same_bits_and_alignment_heads() -> None:
    model = tiny_whisper()
    heads = torch.tensor([[False, True], [True, False]]).to_sparse()
    model.register_buffer("alignment_heads", heads, persistent=False)
    back = as_openai(as_transformers(model))
    assert back.dims == model.dims
    assert torch.equal(back.alignment_heads.to_dense(), heads.to_dense())
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in back.state_dict().items())


def test_a_converted_model_shares_no_memory_and_keeps_its_output_tied() -> None:
    model = tiny_whisper()
    made = as_transformers(model)
    assert made.proj_out.weight is made.model.decoder.embed_tokens.weight
    ours = {p.data_ptr() for p in model.parameters()}
    assert ours.isdisjoint(p.data_ptr() for p in made.parameters())


@pytest.mark.parametrize("layout", ["openai", "transformers"])
def test_sites_for_attention_are_24_linears_and_for_mlp_8(layout: Layout) -> None:
    model = tiny_speech(layout).model
    attention = select(model, sites_for(layout, "attention"))
    assert len(attention) == 4 * 2 + 8 * 2
    assert len(select(model, sites_for(layout, "mlp"))) == 8
    assert len(select(model, sites_for(layout, "query-value"))) == 12
    assert len(select(model, sites_for(layout, "encoder-attention"))) == 8
    assert len(select(model, sites_for(layout, "decoder-attention"))) == 16
    both = select(model, sites_for(layout, "linear"))
    assert len(both) == 32
    assert not any("proj_out" in s.name or "token" in s.name for s in both)
    made = attach(model, LoRA(rank=4), at=sites_for(layout, "attention"))
    assert made.trainable_count() == 24 * 4 * (64 + 64) == 12_288


def test_sites_of_both_layouts_are_the_same_layers() -> None:
    for what in ("attention", "query-value", "mlp", "encoder-attention", "decoder-attention"):
        one = select(tiny_speech("openai").model, sites_for("openai", what))
        other = select(tiny_speech("transformers").model, sites_for("transformers", what))
        assert {to_transformers(site.path) for site in one} == {site.path for site in other}


def test_unknown_sites_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(AdaptError, match=r"no sites are called 'norm'; there are attention, "):
        sites_for("openai", "norm")


def _bias(layout: Layout, what: str) -> tuple[str, ...]:
    return tuple(f"{pattern}.bias" for pattern in sites_for(layout, what))


# A recipe with its own patterns and its sites, by layout.
CASES: dict[str, Callable[[Layout], tuple[Recipe, tuple[str, ...]]]] = {
    "LoRA": lambda layout: (LoRA(rank=4), sites_for(layout, "linear")),
    "LoRA with ranks": lambda layout: (
        LoRA(rank=4, ranks={"**.query" if layout == "openai" else "**.q_proj": 2}),
        sites_for(layout, "query-value"),
    ),
    "IA3": lambda layout: (
        IA3(inputs=["**.mlp.2" if layout == "openai" else "**.fc2"]),
        sites_for(layout, "mlp"),
    ),
    "S2LoRA": lambda layout: (S2LoRA(rank=4), sites_for(layout, "attention")),
    "BitFit": lambda layout: (BitFit(), _bias(layout, "mlp")),
}


@both_ways
@pytest.mark.parametrize("case", CASES)
def test_a_set_of_one_layout_gives_the_same_logits_on_the_other(
    here: Layout, there: Layout, case: str, tmp_path: Path
) -> None:
    one, other = tiny_speech(here), tiny_speech(there)
    recipe, at = CASES[case](here)
    made = attach(one.model, recipe, at=at, name="a")
    made.extra["seconds"] = 1.5
    frozen = _logits(one)
    stir(made)
    made.save(tmp_path / "a.safetensors")
    wanted = _logits(one)
    assert float((wanted - frozen).abs().max()) > 0.1
    loaded = load_set(other, tmp_path / "a.safetensors")
    assert _agree(_logits(other), wanted)
    assert loaded.extra["seconds"] == 1.5
    with activate(other.model, None):
        assert _agree(_logits(other), frozen)
    # Saved from there, it is a file of that layout, and comes back with the same bits.
    loaded.save(tmp_path / "b.safetensors")
    back = tiny_speech(here)
    load_set(back, tmp_path / "b.safetensors")
    assert torch.equal(_logits(back), wanted)


@both_ways
def test_a_compact_set_of_one_layout_gives_the_same_logits_on_the_other(
    here: Layout, there: Layout, tmp_path: Path
) -> None:
    one, other = tiny_speech(here), tiny_speech(there)
    made = attach(one.model, S2LoRA(rank=4), at=sites_for(here, "attention"), name="a")
    stir(made)
    for adapter in list(made.adapters.values())[::2]:  # half of the sites lose two ranks
        with torch.no_grad():
            adapter.get_parameter("lam")[:2] = 0
    save_form(made, tmp_path / "a.safetensors", compact(made, values=torch.float32))
    load_set(other, tmp_path / "a.safetensors")
    assert _agree(_logits(other), _logits(one))


def test_a_set_of_the_same_layout_loads_as_it_does_with_the_core(tmp_path: Path) -> None:
    made = attach(tiny_speech().model, LoRA(rank=2), at=sites_for("openai"), name="a")
    stir(made)
    made.save(tmp_path / "a.safetensors")
    one, other = tiny_speech(), tiny_speech()
    load_set(one, tmp_path / "a.safetensors", "mine")
    load(other.model, tmp_path / "a.safetensors", "mine")
    assert torch.equal(_logits(one), _logits(other))


@both_ways
def test_a_set_of_other_weights_is_refused_in_the_other_layout_too(
    here: Layout, there: Layout, tmp_path: Path
) -> None:
    made = attach(tiny_speech(here).model, LoRA(rank=2), at=sites_for(here), name="a")
    made.save(tmp_path / "a.safetensors")
    other = tiny_speech(there, seed=1)
    with pytest.raises(StoreError, match="was made on other weights: 24 of 24"):
        load_set(other, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="was made on other weights"):
        load_set(other, tmp_path / "a.safetensors", strict=False)


def test_a_set_of_no_whisper_is_refused_in_one_line(tmp_path: Path) -> None:
    attach(nn.Sequential(nn.Linear(4, 4)), LoRA(rank=2), at="0").save(tmp_path / "a.safetensors")
    for layout in ("openai", "transformers"):
        with pytest.raises(StoreError, match=r"a\.safetensors is .*(no set of|another backbone)"):
            load_set(tiny_speech(layout), tmp_path / "a.safetensors")


def test_only_the_two_whisper_classes_are_taken() -> None:
    with pytest.raises(AdaptError, match="Linear is no Whisper"):
        speech_of(nn.Linear(2, 2))
