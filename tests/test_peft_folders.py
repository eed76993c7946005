"""Settings of PEFT folders: patterns, names, heads, fused rows, pruned ranks, shapes, dtypes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import (
    AdaLoRA,
    AdaptError,
    DoRA,
    LoRA,
    attach,
    export_peft,
    import_peft,
    load,
)
from polyadapt.core.peft import config as settings
from polyadapt.core.peft.names import exactly
from polyadapt.tests.law_table import stir
from polyadapt.tests.peft_cases import (
    CASES,
    REALS,
    apart,
    loaded,
    nested,
    outputs,
    peft_model,
    quiet,
    rewrite,
    saved,
    states,
    tensors,
    wrapped,
)

VIT = CASES["timm ViT"]


def test_every_field_of_pefts_configs_is_in_exactly_one_class() -> None:
    for method, cls in (("LORA", peft.LoraConfig), ("ADALORA", peft.AdaLoraConfig)):
        own = settings.OF_METHOD[method]
        classes = [settings.NO_EFFECT, settings.UNDERSTOOD, settings.REFUSED, own]
        inherited = settings.OF_METHOD["LORA"] - own if method == "ADALORA" else set()
        for field in dataclasses.fields(cls):
            where = sum(field.name in group for group in classes)
            assert where == (0 if field.name in inherited else 1), field.name


def test_a_config_of_four_fields_is_enough(tmp_path: Path) -> None:
    made = peft_model(nested(), ["fc"])
    expected = made(states())
    saved(made, tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["fc"]})
    )
    model = nested()
    import_peft(model, tmp_path)
    assert apart(model(states()), expected) <= 1e-6


def test_the_names_in_memory_with_default_are_read_too(tmp_path: Path) -> None:
    made = peft_model(nested(), ["fc"], "DoRA")
    expected = made(states())
    saved(made, tmp_path)

    def rename(found: dict[str, Tensor]) -> None:
        for key in list(found):
            path, _, end = key.partition(".lora_")
            name, _, rest = end.partition(".")
            rest = rest or ("weight" if name == "magnitude_vector" else "")
            found[f"{path}.lora_{name}.default.{rest}"] = found.pop(key)

    rewrite(tmp_path, change=rename)
    model = nested()
    import_peft(model, tmp_path)
    assert apart(model(states()), expected) <= 1e-6


def test_ranks_and_alphas_of_patterns_give_pefts_outputs(tmp_path: Path) -> None:
    patterns: dict[str, Any] = {
        "rank_pattern": {r"blocks\.0\..*qkv": 2, "^blocks.1.mlp.fc1": 8},
        "alpha_pattern": {"mlp.fc1": 16, "^qkv": 5},
    }
    made = peft_model(VIT.model(), VIT.target, "rsLoRA", **patterns)
    expected = outputs(VIT.real, made.get_base_model())
    saved(made, tmp_path)
    model = VIT.model()
    ours = import_peft(model, tmp_path)
    assert apart(outputs(VIT.real, model), expected) <= 1e-5
    ranks = {site.path: len(adapter.state_dict()["A"]) for site, adapter in ours.pairs()}
    assert (ranks["blocks.0.attn.qkv"], ranks["blocks.1.attn.qkv"]) == (2, 4)
    assert (ranks["blocks.0.mlp.fc1"], ranks["blocks.1.mlp.fc1"]) == (4, 8)
    ours.save(tmp_path / "ours.safetensors")
    again = VIT.model()
    load(again, tmp_path / "ours.safetensors")
    assert torch.equal(outputs(VIT.real, again), outputs(VIT.real, model))


def test_ranks_of_sites_are_written_as_patterns_that_fit_no_other_site(tmp_path: Path) -> None:
    model = nested()
    ours = stir(attach(model, LoRA(rank=2, alpha=3, ranks={"fc": 5}), ["patch.proj", "fc"]))
    export_peft(ours, tmp_path / "set")
    config = json.loads((tmp_path / "set" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"^fc": 5}
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (2, 3, {})
    made = loaded(nested(), tmp_path / "set")
    assert apart(made(states()), model(states())) <= 1e-6


@pytest.mark.parametrize("sites", [["proj"], ["patch.proj"], ["proj", "fc"]], ids=str)
def test_exactly_our_sites_are_wrapped_where_names_are_tails_of_names(
    sites: list[str], tmp_path: Path
) -> None:
    model = nested()
    export_peft(stir(attach(model, LoRA(rank=2), sites)), tmp_path / "set")
    made = loaded(nested(), tmp_path / "set")
    assert wrapped(made) == set(sites)
    assert apart(made(states()), model(states())) <= 1e-6


def test_target_modules_is_a_list_where_a_list_is_exact() -> None:
    known = ["", "proj", "patch", "patch.proj", "fc"]
    assert exactly(["patch.proj", "fc"], known) == ["patch.proj", "fc"]
    assert exactly(["proj"], known) == "proj"
    assert exactly(["patch.proj"], None) == r"patch\.proj"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*\.(?:qkv|fc1)"},
        {
            "target_modules": ["qkv", "fc1"],
            "layers_to_transform": [1],
            "layers_pattern": ["blocks"],
        },
        {"target_modules": ["qkv", "fc1"], "layers_to_transform": 0, "layers_pattern": "blocks"},
        {"target_modules": ["qkv", "fc1"], "exclude_modules": ["blocks.0.attn.qkv"]},
        {"target_modules": ["qkv", "fc1"], "exclude_modules": r".*\.0\.mlp.*"},
    ],
    ids=str,
)
def test_modules_are_chosen_as_peft_chooses_them(settings: dict[str, Any], tmp_path: Path) -> None:
    made = peft_model(VIT.model(), settings.pop("target_modules"), **settings)
    expected = outputs(VIT.real, made.get_base_model())
    saved(made, tmp_path)
    model = VIT.model()
    ours = import_peft(model, tmp_path)
    assert {site.path for site in ours.sites} == wrapped(made)
    assert apart(outputs(VIT.real, model), expected) <= 1e-5


def test_layers_are_counted_by_the_first_number_in_a_path(tmp_path: Path) -> None:
    case = CASES["transformers Whisper"]
    made = peft_model(case.model(), ["q_proj"], layers_to_transform=[1])
    ours = import_peft(case.model(), saved(made, tmp_path))
    assert {site.path for site in ours.sites} == wrapped(made)
    assert all(".layers.1." in site.path for site in ours.sites)


def test_rows_of_a_fused_projection_become_one_adapter_of_the_whole(tmp_path: Path) -> None:
    model = VIT.model()
    recipe = LoRA(rank=3, alpha=7, scaling="rank_stabilised")
    export_peft(stir(attach(model, recipe, "blocks.*.attn.qkv[v,q]")), tmp_path / "set")
    found = tensors(tmp_path / "set")
    b = found["base_model.model.blocks.0.attn.qkv.lora_B.weight"]
    assert b.shape == (96, 6)
    assert not b[32:64].any()
    assert not b[:32, :3].any()  # the first columns are v's
    made = loaded(VIT.model(), tmp_path / "set")
    expected = outputs(VIT.real, model)
    assert apart(outputs(VIT.real, made.get_base_model()), expected) <= 1e-5


@pytest.mark.parametrize("recipe", [DoRA(rank=2), AdaLoRA(rank=2), LoRA(rank=2, dropout=0.1)])
def test_rows_are_refused_where_padding_them_would_not_be_exact(
    recipe: Any, tmp_path: Path
) -> None:
    ours = attach(VIT.model(), recipe, "blocks.*.attn.qkv[q,v]")
    with pytest.raises(AdaptError, match="rows of a fused projection"):
        export_peft(ours, tmp_path / "set")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", [LoRA(rank=4), DoRA(rank=4)], ids=["LoRA", "DoRA"])
def test_shapes_in_the_file_are_pefts(recipe: Any, tmp_path: Path) -> None:
    model = REALS["openai Whisper"].model()
    whisper = attach(model, recipe, ["encoder.conv1", "decoder.blocks.0.attn.query"])
    export_peft(whisper, tmp_path / "whisper")
    export_peft(attach(REALS["GPT-2"].model(), recipe, "wte"), tmp_path / "gpt2")
    vit = attach(VIT.model(), recipe, "patch_embed.proj")
    export_peft(vit, tmp_path / "vit")
    found = {
        key.removeprefix("base_model.model."): list(tensor.shape)
        for folder in ("whisper", "gpt2", "vit")
        for key, tensor in tensors(tmp_path / folder).items()
    }
    shapes = {
        "encoder.conv1.lora_A.weight": [4, 8, 3],
        "encoder.conv1.lora_B.weight": [16, 4, 1],
        "decoder.blocks.0.attn.query.lora_A.weight": [4, 16],
        "decoder.blocks.0.attn.query.lora_B.weight": [16, 4],
        "wte.lora_embedding_A": [4, 20],
        "wte.lora_embedding_B": [32, 4],
        "patch_embed.proj.lora_A.weight": [4, 3, 8, 8],
        "patch_embed.proj.lora_B.weight": [32, 4, 1, 1],
    }
    magnitudes = {
        "encoder.conv1.lora_magnitude_vector": [1, 16, 1],
        "decoder.blocks.0.attn.query.lora_magnitude_vector": [16],
        "wte.lora_magnitude_vector": [32],
        "patch_embed.proj.lora_magnitude_vector": [1, 32, 1, 1],
    }
    assert found == (shapes | magnitudes if isinstance(recipe, DoRA) else shapes)


def test_adaloras_scale_is_pefts_alpha_over_rank_and_a_little(tmp_path: Path) -> None:
    made = peft_model(nested(), ["fc"], "AdaLoRA", init_r=4, lora_alpha=32)
    ours = import_peft(nested(), saved(made, tmp_path))
    assert isinstance(ours.recipe, AdaLoRA)
    assert ours.recipe.scale == pytest.approx(32 / 4.00001, rel=1e-15)
    export_peft(ours, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 32


def test_triplets_that_adalora_pruned_come_back_as_zeros_in_their_places(tmp_path: Path) -> None:
    made = peft_model(nested(), ["fc", "proj"], "AdaLoRA")
    masks = {
        "fc.lora_E": [True, False, False, True],
        "proj.lora_E": [True] * 4,
        "patch.proj.lora_E": [False] * 4,
    }
    for name, mask in masks.items():
        layer = made.get_base_model().get_submodule(name.removesuffix(".lora_E"))
        layer.lora_E["default"].data[~torch.tensor(mask)] = 0
    expected = made(states())
    made.peft_config["default"].rank_pattern = {f"{k}.default": mask for k, mask in masks.items()}
    saved(made, tmp_path)
    assert len(tensors(tmp_path)["base_model.model.fc.lora_A"]) == 2
    model = nested()
    ours = import_peft(model, tmp_path)
    assert apart(model(states()), expected) <= 1e-6
    e = ours.state_dict()["fc/E"]
    assert e.count_nonzero() == 2
    assert not e[1:3].any()
    assert not ours.state_dict()["patch.proj/E"].any()


def test_a_saved_head_goes_to_the_set_and_back(tmp_path: Path) -> None:
    model = VIT.model()
    made = peft_model(model, ["qkv"], modules_to_save=["head"])
    with torch.no_grad():
        made.get_base_model().head.modules_to_save.default.weight.add_(1)
    expected = outputs(VIT.real, made.get_base_model())
    saved(made, tmp_path / "peft")
    other = VIT.model()
    with pytest.raises(AdaptError, match=r"it holds head\.weight .* not the backbone's"):
        import_peft(other, tmp_path / "peft")
    found = tensors(tmp_path / "peft")
    own = {key: found[f"base_model.model.head.{key}"] for key in ("weight", "bias")}
    other.head.load_state_dict(own)
    ours = import_peft(other, tmp_path / "peft")
    assert apart(outputs(VIT.real, other), expected) <= 1e-5
    assert set(ours.head) == {"head.weight", "head.bias"}
    export_peft(ours, tmp_path / "again")
    again = tensors(tmp_path / "again")
    assert again.keys() == found.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in found.items())
    with quiet():
        back = peft.PeftModel.from_pretrained(VIT.model(), str(tmp_path / "again"))
    assert apart(outputs(VIT.real, back.get_base_model()), expected) <= 1e-5


def test_a_backbone_without_head_gets_it_beside_the_set(tmp_path: Path) -> None:
    made = peft_model(VIT.model(), ["qkv"], modules_to_save=["head"])
    saved(made, tmp_path)
    model = VIT.model()
    model.reset_classifier(0)
    ours = import_peft(model, tmp_path)
    head = made.get_base_model().head.modules_to_save.default
    assert torch.equal(ours.head["head.weight"], head.weight)
    assert torch.equal(ours.head["head.bias"], head.bias)


def test_an_embeddings_table_beside_its_adapter_must_be_the_backbones(tmp_path: Path) -> None:
    case = CASES["GPT-2"]
    saved(peft_model(case.model(), ["wte"]), tmp_path)
    table = "base_model.model.wte.base_layer.weight"  # PEFT saves that of an `embed_tokens`
    rewrite(tmp_path, change=lambda t: t.update({table: case.model().wte.weight.detach()}))
    import_peft(case.model(), tmp_path)
    rewrite(tmp_path, change=lambda t: t[table][0].add_(1))
    with pytest.raises(AdaptError, match=r"it holds wte\.weight .* not the backbone's"):
        import_peft(case.model(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_widened_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    made = peft_model(nested(), ["fc"])
    saved(made, tmp_path)
    rewrite(tmp_path, change=lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    model = nested()
    ours = import_peft(model, tmp_path)
    found = tensors(tmp_path)["base_model.model.fc.lora_A.weight"]
    assert torch.equal(ours.state_dict()["fc/A"], found.float())
    assert apart(model(states()), loaded(nested(), tmp_path)(states())) <= 1e-6


def test_a_frozen_set_is_imported_unless_training_is_asked_for(tmp_path: Path) -> None:
    for method in ("LoRA", "AdaLoRA"):
        folder = saved(peft_model(nested(), ["fc"], method, lora_dropout=0.2), tmp_path / method)
        assert import_peft(nested(), folder).trainable_count() > 0
        assert not any(p.requires_grad for p in import_peft(nested(), folder).parameters())
        ours = import_peft(nested(), folder, "pets", trainable=True)
        assert all(p.requires_grad for p in ours.parameters())
        assert (ours.name, getattr(ours.recipe, "dropout", None)) == ("pets", 0.2)
        assert getattr(ours.recipe, "allocate", True)


def test_dropout_where_a_weight_is_read_matters_in_training_only(tmp_path: Path) -> None:
    made = peft_model(VIT.model(), ["patch_embed.proj"], lora_dropout=0.2)
    saved(made, tmp_path)
    model = VIT.model()
    import_peft(model, tmp_path)
    assert apart(outputs(VIT.real, model), outputs(VIT.real, made.get_base_model())) <= 1e-5
    with pytest.raises(AdaptError, match=r"dropout=0\.2 cannot act on patch_embed\.proj"):
        import_peft(VIT.model(), tmp_path, trainable=True)


def test_a_set_with_its_head_becomes_pefts_classifier(tmp_path: Path) -> None:
    model = VIT.model()
    model.reset_classifier(0)
    ours = stir(attach(model, DoRA(rank=2), "blocks.*.attn.qkv"))
    head = nn.Linear(32, 5)
    ours.head = {"head.weight": head.weight.detach(), "head.bias": head.bias.detach()}
    export_peft(ours, tmp_path / "set")
    with quiet():
        made = peft.PeftModel.from_pretrained(VIT.model(), str(tmp_path / "set")).eval()
    expected = head(outputs(VIT.real, model))
    assert apart(outputs(VIT.real, made.get_base_model()), expected) <= 1e-5


def test_what_the_folder_says_of_its_origin_is_written_back(tmp_path: Path) -> None:
    saved(peft_model(nested(), ["fc"], task_type="FEATURE_EXTRACTION"), tmp_path)
    rewrite(tmp_path, {"base_model_name_or_path": "owner/base"})
    export_peft(import_peft(nested(), tmp_path), tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base"
    assert config["task_type"] == "FEATURE_EXTRACTION"
