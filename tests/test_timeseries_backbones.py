"""The frozen blocks by name: transformers' own classes, loaded as ever, and what replaces them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import LoRA, attach
from polyadapt.core.errors import AdaptError
from polyadapt.core.minilm import tensors
from polyadapt.tests.series_cases import SIZES, stir
from polyadapt.timeseries.backbones import (
    GPT2,
    Backbone,
    LanguageModel,
    NoLanguageModel,
    OfflineMiniLM,
    OneAttention,
)
from polyadapt.timeseries.network import Network
from polyadapt.timeseries.patches import Patches


def tiny(**changes: Any) -> GPT2:
    return GPT2(**{"pretrained": False, "blocks": 2, "options": SIZES, **changes})


def embedded(width: int = 16) -> Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> str:
    """Three blocks of width 16 as transformers itself saves them."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(5)
    GPT2Model(GPT2Config(n_layer=3, **SIZES)).save_pretrained(tmp_path)
    return str(tmp_path)


def test_random_blocks_are_the_same_when_built_again_and_leave_the_callers_draws_alone() -> None:
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again = tiny().build(), Backbone.from_json(tiny().to_json()).build()
    assert torch.equal(torch.rand(1), expected)
    other = tiny(seed=1).build()
    assert torch.equal(first(embedded()), again(embedded()))
    assert not torch.equal(first(embedded()), other(embedded()))
    assert not first.training


def test_the_blocks_are_gpt2_called_with_embeddings_in_the_place_of_words() -> None:
    from transformers import GPT2Config, GPT2Model

    blocks: Any = tiny().build()
    whole = GPT2Model(GPT2Config(n_layer=2, **SIZES)).eval()
    whole.load_state_dict(blocks.model.state_dict(), strict=False)
    x = embedded()
    expected = whole(inputs_embeds=x).last_hidden_state
    assert torch.equal(blocks(x), expected)
    table = {id(p) for p in blocks.model.wpe.parameters()}
    assert {id(p) for p in blocks.get_submodule(blocks.positions_at).parameters()} == table
    assert not any("wte" in name for name, _ in blocks.named_parameters())


def test_attention_is_causal_in_gpt2_and_looks_both_ways_in_minilm() -> None:
    x = embedded()
    changed = x.clone()
    changed[:, -1] = x[:, -1].flip(-1)
    blocks = tiny().build()
    assert torch.equal(blocks(x)[:, :-1], blocks(changed)[:, :-1])
    both = OfflineMiniLM(blocks=1, pretrained=False).build()
    x = embedded(384)
    changed = x.clone()
    changed[:, -1] = x[:, -1].flip(-1)
    assert (both(x)[:, 0] - both(changed)[:, 0]).abs().max() > 1e-3


def test_pretrained_weights_come_through_transformers_own_loading(gpt2_folder: str) -> None:
    from transformers import GPT2Model

    whole = GPT2Model.from_pretrained(gpt2_folder).eval()
    own = GPT2(name=gpt2_folder, blocks=3).build()
    any_model = LanguageModel(name=gpt2_folder, blocks=3).build()
    x = embedded()
    expected = whole(inputs_embeds=x).last_hidden_state
    assert torch.equal(own(x), expected)
    assert torch.equal(any_model(x), expected)


def test_the_first_blocks_keep_their_weights_and_the_final_norm(gpt2_folder: str) -> None:
    from transformers import GPT2Model

    whole = GPT2Model.from_pretrained(gpt2_folder).eval()
    whole.h = whole.h[:2]
    two = GPT2(name=gpt2_folder, blocks=2).build()
    x = embedded()
    assert torch.equal(two(x), whole(inputs_embeds=x).last_hidden_state)
    with pytest.raises(AdaptError, match="blocks=4 is not allowed: this language model has 3"):
        GPT2(name=gpt2_folder, blocks=4).build()


def test_loading_says_nothing_on_the_way(
    gpt2_folder: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    level = logging.getLogger("transformers").level
    GPT2(name=gpt2_folder, blocks=2).build()
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("transformers").level == level


def test_random_weights_of_a_saved_models_size_can_be_drawn(gpt2_folder: str) -> None:
    drawn = [LanguageModel(name=gpt2_folder, blocks=2, pretrained=False, seed=s) for s in (1, 1, 2)]
    found = [one.build()(embedded()) for one in drawn]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def _saved(folder: Path, kind: str, **config: Any) -> str:
    """A tiny random model of another class of transformers."""
    import transformers

    settings = getattr(transformers, f"{kind}Config")(**config)
    getattr(transformers, f"{kind}Model")(settings).save_pretrained(folder)
    return str(folder)


ROTARY = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
}
ROBERTA = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}
OPT = {
    "vocab_size": 8,
    "hidden_size": 16,
    "ffn_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 40,
}


@pytest.mark.parametrize(
    ("kind", "config", "table", "limit"),
    [
        ("Llama", ROTARY, "positions", 40),
        ("OPT", OPT, "positions", 40),
        ("Roberta", ROBERTA, "model.embeddings.position_embeddings", 38),
    ],
)
def test_other_decoders_and_encoders_have_a_table_to_adapt_even_with_rotary_positions(
    tmp_path: Path, kind: str, config: dict[str, Any], table: str, limit: int
) -> None:
    from transformers import AutoModel

    blocks = LanguageModel(name=_saved(tmp_path, kind, **config), blocks=2).build()
    assert (blocks.positions_at, blocks.limit, blocks.width) == (table, limit, 16)
    x = embedded()
    whole = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(blocks(x), whole(inputs_embeds=x).last_hidden_state)
    network = Network(blocks, 48, Patches(16, 8), outputs=4)
    adapters = attach(network, LoRA(rank=2), network.sites)
    window = torch.randn(2, 48, 1)
    before = network(window)
    stir(adapters)
    assert (network(window) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("T5", {"vocab_size": 8, "d_model": 16, "num_layers": 6}, "T5Model is not allowed"),
        ("Albert", {"vocab_size": 8, "embedding_size": 8, "hidden_size": 16}, "of width 8 and"),
    ],
)
def test_models_of_another_kind_are_refused_in_one_line(
    tmp_path: Path, kind: str, config: dict[str, Any], message: str
) -> None:
    small = {"num_attention_heads": 2, "num_hidden_layers": 6} if kind == "Albert" else {}
    folder = _saved(tmp_path, kind, **config, **small)
    with pytest.raises(AdaptError, match=message) as caught:
        LanguageModel(name=folder, blocks=6).build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (GPT2(name="nowhere/./none"), "cannot load transformers' GPT2Model 'nowhere/./none'"),
        (LanguageModel(name="nowhere/./none"), "or OfflineMiniLM"),
        (tiny(options={"n_embd": 15, "n_head": 2}), "cannot load transformers' GPT2Model 'gpt2'"),
        (OfflineMiniLM(blocks=7), "blocks=7 is not allowed: MiniLM has 6"),
        (OneAttention(width=10, heads=4), "heads=4 is not allowed: a divisor of width=10"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_built_is_one_line(backbone: Backbone, message: str) -> None:
    with pytest.raises(AdaptError) as caught:
        backbone.build()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(AdaptError, match="is for random weights: set pretrained=false"):
        GPT2(options={"n_embd": 8})
    for kind in (GPT2, OfflineMiniLM):
        with pytest.raises(AdaptError, match="blocks=0 is not allowed: a whole number from 1"):
            kind(blocks=0)


def test_a_folder_with_damaged_weights_is_one_line(gpt2_folder: str) -> None:
    (Path(gpt2_folder) / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(AdaptError, match="cannot load transformers' GPT2Model"):
        GPT2(name=gpt2_folder, blocks=2).build()
    (Path(gpt2_folder) / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 0}))
    with pytest.raises(AdaptError, match="this language model has 0"):
        GPT2(name=gpt2_folder, blocks=1).build()


def test_minilm_has_the_wheels_weights_and_random_ones_differ() -> None:
    held = tensors()
    real: Any = OfflineMiniLM(blocks=2).build()
    drawn: Any = OfflineMiniLM(blocks=2, pretrained=False).build()
    name = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(real.model.state_dict()[name], held[name])
    assert not torch.equal(drawn.model.state_dict()[name], held[name])
    assert (real.width, real.limit) == (384, 512)
    assert sum(p.numel() for p in real.parameters()) == 512 * 384 + 2 * 384 + 2 * 384 + 2 * 1774464
    x = embedded(384)
    assert not torch.equal(real(x), drawn(x))


@pytest.mark.slow
def test_a_forecaster_on_the_real_minilm_learns_through_its_six_blocks() -> None:
    network = Network(OfflineMiniLM().build(), 96, Patches(16, 16), outputs=8).eval()
    adapters = attach(network, LoRA(rank=4, alpha=4), network.sites)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=3e-3)
    time = torch.arange(104.0)
    waves = torch.sin(time * 0.4 + torch.rand(16, 1) * 6).unsqueeze(-1)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (network(waves[:, :96]) - waves[:, 96:, 0]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


def test_without_a_language_model_a_state_is_the_patch_and_its_position() -> None:
    blocks = NoLanguageModel(width=16, positions=8).build()
    x = embedded()
    (table,) = blocks.parameters()
    assert torch.equal(blocks(x), x + table[:5])
    assert table.std().item() == pytest.approx(0.02, rel=0.2)


def test_one_attention_mixes_all_patches() -> None:
    blocks: Any = OneAttention(width=16, heads=2, positions=8).build()
    x = embedded()
    changed = x.clone()
    changed[:, -1] = x[:, -1].flip(-1)
    assert (blocks(x)[:, 0] - blocks(changed)[:, 0]).abs().max() > 1e-4
    q, k, v = blocks.qkv(blocks.norm(x + blocks.positions.weight[:5])).chunk(3, -1)
    heads = nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():  # torch's own attention with identity projections
        heads.in_proj_weight.copy_(torch.eye(16).repeat(3, 1))
        heads.out_proj.weight.copy_(torch.eye(16))
    mixed, _ = heads(q, k, v)
    expected = x + blocks.positions.weight[:5] + blocks.proj(mixed)
    torch.testing.assert_close(blocks(x), expected)
