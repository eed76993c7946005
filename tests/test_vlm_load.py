"""A set of split towers on unsplit ones, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import AdapterSet, BitFit, LoRA, Recipe, attach
from polyadapt.core.errors import AdaptError, StoreError
from polyadapt.tests.vlm_models import clip, images, normed_clip, tokens, transformers_clip
from polyadapt.vlm.adapters import CLIP_LORA, load_set
from polyadapt.vlm.model import image_text_of
from polyadapt.vlm.names import sites_for
from polyadapt.vlm.split import split_attention

pytestmark = pytest.mark.slow  # whole runs


def _tower(split: bool, seed: int = 0) -> nn.Module:
    model = clip(seed)
    if split:
        split_attention(model)
    return model


def _trained(model: nn.Module, recipe: Recipe, at: list[str]) -> AdapterSet:
    made = attach(model, recipe, at, "pets")
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=source) / 4)
    return made


def _features(model: nn.Module) -> Tensor:
    pair = image_text_of(model)
    with torch.no_grad():
        return torch.cat([pair.image_features(images()), pair.text_features(tokens())])


@pytest.mark.parametrize("parts", ["qv", "qkvo", "o"])
@pytest.mark.parametrize("split", [True, False], ids=["split to unsplit", "unsplit to split"])
def test_a_set_loads_on_the_other_form_of_its_towers(
    split: bool, parts: str, tmp_path: Path
) -> None:
    model, other = _tower(split), _tower(not split)
    recipe = CLIP_LORA if split else CLIP_LORA.replace(dropout=0.0)
    made = _trained(model, recipe, sites_for(model, parts=parts))
    made.extra = {"task": "pets"}
    made.save(tmp_path / "pets.safetensors")
    loaded = load_set(other, tmp_path / "pets.safetensors")
    torch.testing.assert_close(_features(other), _features(model), atol=1e-6, rtol=0)
    assert (_features(other) - _features(_tower(False))).abs().max() > 1e-3
    assert loaded.extra == {"task": "pets"}
    assert set(loaded.sites) != set(made.sites)


def test_it_merges_into_open_clips_plain_weights(tmp_path: Path) -> None:
    model, plain = _tower(True), _tower(False)
    made = _trained(model, CLIP_LORA, sites_for(model))
    made.save(tmp_path / "pets.safetensors")
    wanted = _features(model)
    loaded = load_set(plain, tmp_path / "pets.safetensors")
    loaded.merge()
    weights = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    fresh = clip(seed=3)
    fresh.load_state_dict(weights)  # no name is ours
    torch.testing.assert_close(_features(fresh), wanted, atol=1e-5, rtol=0)


def test_a_set_of_biases_and_ranks_by_site_find_their_names(tmp_path: Path) -> None:
    model, other = _tower(True), _tower(False)
    made = _trained(model, BitFit(), ["**.attn.{q_proj,v_proj}.bias"])
    made.save(tmp_path / "bias.safetensors")
    load_set(other, tmp_path / "bias.safetensors")
    torch.testing.assert_close(_features(other), _features(model), atol=1e-6, rtol=0)

    model, other = _tower(True), _tower(False)
    recipe = LoRA(rank=2, ranks={"visual.**.q_proj": 3})
    made = _trained(model, recipe, sites_for(model, parts="qv"))
    made.save(tmp_path / "ranks.safetensors")
    assert load_set(other, tmp_path / "ranks.safetensors").trainable_count() == (
        made.trainable_count()
    )
    torch.testing.assert_close(_features(other), _features(model), atol=1e-6, rtol=0)


def test_a_set_loads_on_its_own_form_as_ever(tmp_path: Path) -> None:
    model, again = _tower(True), _tower(True)
    made = _trained(model, CLIP_LORA, sites_for(model, parts="qkvo"))
    made.save(tmp_path / "pets.safetensors")
    loaded = load_set(again, tmp_path / "pets.safetensors", "again", trainable=True)
    assert (loaded.name, loaded.recipe, loaded.sites) == ("again", made.recipe, loaded.sites)
    assert torch.equal(_features(again), _features(model))


def test_training_on_is_refused_where_its_dropout_cannot_act(tmp_path: Path) -> None:
    model, plain = _tower(True), _tower(False)
    _trained(model, CLIP_LORA, sites_for(model)).save(tmp_path / "pets.safetensors")
    with pytest.raises(AdaptError, match=r"dropout=0\.25 cannot act"):
        load_set(plain, tmp_path / "pets.safetensors", trainable=True)
    assert load_set(plain, tmp_path / "pets.safetensors").recipe == CLIP_LORA.replace(dropout=0.0)


@pytest.mark.parametrize("split", [True, False], ids=["split to unsplit", "unsplit to split"])
def test_other_weights_are_found_out_in_either_form(split: bool, tmp_path: Path) -> None:
    model, other = _tower(split), _tower(not split)
    made = _trained(model, LoRA(rank=2), sites_for(model, "text", "q"))
    made.save(tmp_path / "pets.safetensors")
    name = "transformer.resblocks.1.attn." + ("in_proj_weight" if split else "q_proj.weight")
    with torch.no_grad():
        other.get_parameter(name)[0, 0] += 1e-3
    with pytest.raises(StoreError, match="1 of 2 frozen weights differ"):
        load_set(other, tmp_path / "pets.safetensors")
    with pytest.warns(UserWarning, match="1 of 2 frozen weights differ"):
        load_set(other, tmp_path / "pets.safetensors", strict=False)


def test_a_set_of_another_tower_is_refused_in_one_line(tmp_path: Path) -> None:
    model = _tower(True)
    _trained(model, CLIP_LORA, sites_for(model)).save(tmp_path / "pets.safetensors")
    for other in (clip(width=8, head_width=8), normed_clip(), transformers_clip(), nn.Linear(2, 2)):
        before = list(other.state_dict())
        with pytest.raises(StoreError) as error:
            load_set(other, tmp_path / "pets.safetensors")
        assert "\n" not in str(error.value)
        assert list(other.state_dict()) == before
