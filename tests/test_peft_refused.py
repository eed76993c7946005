"""What PEFT folders may not hold, and what cannot be written as one: one line, nothing changed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import (
    AdaptError,
    AdaptFormer,
    BitFit,
    HeadOnly,
    LoRA,
    attach,
    export_peft,
    import_peft,
    sets_of,
)
from polyadapt.core.peft.config import REFUSED
from polyadapt.tests.law_models import LAYERS
from polyadapt.tests.law_real_models import gpt2_with_head
from polyadapt.tests.peft_cases import (
    REALS,
    apart,
    nested,
    outputs,
    peft_model,
    rewrite,
    saved,
)

A, B = ("base_model.model.fc.lora_A.weight", "base_model.model.fc.lora_B.weight")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder for `nested`."""
    return saved(peft_model(nested(), ["fc"]), tmp_path / "peft")


def refused(model: nn.Module, folder: Path) -> str:
    """The one line that the import ends with; the model is as it was."""
    with pytest.raises(AdaptError) as caught:
        import_peft(model, folder)
    assert not sets_of(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("key", sorted(REFUSED | {"a_field_of_tomorrow"}))
def test_a_field_that_changes_numbers_is_refused_by_name(key: str, folder: Path) -> None:
    neutrals: list[Any] = [None, False, "", [], {}]
    for neutral in neutrals:
        rewrite(folder, {key: neutral})
        import_peft(nested(), folder)
    for value in (True, 3, 0, "all", ["x"], {"a": 1}):
        rewrite(folder, {key: value})
        assert repr(key) in refused(nested(), folder)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; allowed: LORA and ADALORA"),
    ({"peft_type": None}, "peft_type is None"),
    ({"peft_type": ["LORA"]}, "peft_type is"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"init_lora_weights": 1}, "init_lora_weights is 1"),
    ({"r": 0}, "r is 0; allowed: a whole number from 1"),
    ({"r": 10**400}, "allowed: a whole number from 1 to 1e[+]300"),
    ({"rank_pattern": {"fc": 10**400}}, "allowed: a whole number from 1 to 1e[+]300"),
    ({"r": True}, "r is True"),
    ({"r": 10**30}, "fc"),
    ({"r": 3}, "rank 3 at fc"),
    ({"lora_alpha": "big"}, "lora_alpha is 'big'; allowed: a finite number"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    ({"lora_alpha": 0}, "alpha=0"),
    ({"lora_dropout": 1.5}, "dropout=1.5"),
    ({"use_dora": "yes"}, "use_dora is 'yes'; allowed: true or false"),
    ({"use_dora": True}, "lora_magnitude_vector' is missing"),
    ({"target_modules": None}, "target_modules is"),
    ({"target_modules": "all-linear"}, "target_modules is 'all-linear'"),
    ({"target_modules": 5}, "target_modules is 5"),
    ({"target_modules": [5]}, r"target_modules is \[5\]"),
    ({"target_modules": ["fc", "proj"]}, "target_modules names patch.proj, of which there are no"),
    ({"target_modules": ["proj"]}, "target_modules leaves fc out"),
    ({"target_modules": "f("}, "no regular expression"),
    ({"target_modules": "f[[a]c"}, "no regular expression"),
    ({"target_modules": "(f+)+c"}, "could take too long"),
    ({"target_modules": "(f|f)" * 40 + "x"}, "could take too long"),
    ({"target_modules": "f?" * 60 + "x"}, "could take too long"),
    ({"target_modules": "(?x) f c"}, "could take too long"),
    ({"target_modules": ["fc"], "exclude_modules": ["fc"]}, "leaves fc out"),
    ({"layers_to_transform": "x"}, "layers_to_transform is 'x'"),
    ({"target_modules": "fc", "layers_to_transform": 0}, "as PEFT refuses"),
    ({"rank_pattern": {"fc": "4"}}, "rank_pattern gives fc '4'"),
    ({"rank_pattern": {"fc": 2}}, "rank 2 at fc"),
    ({"rank_pattern": [2]}, "rank_pattern is"),
    ({"rank_pattern": 0}, "rank_pattern is 0; allowed: an object"),
    ({"exclude_modules": 0}, "exclude_modules is 0"),
    ({"layers_to_transform": 0.0}, "layers_to_transform is 0.0"),
    ({"alpha_pattern": {"fc": None}}, "alpha_pattern is None"),
    ({"alpha_pattern": {"(f*)*": 2}}, "alpha_pattern: .* could take too long"),
    ({"modules_to_save": ["fc"]}, "leaves fc out"),
    ({"modules_to_save": ["patch"]}, "modules_to_save names 'patch'"),
]


@pytest.mark.parametrize(("settings", "words"), CONFIGS, ids=str)
def test_a_bad_setting_is_one_line_that_names_it(
    settings: dict[str, Any], words: str, folder: Path
) -> None:
    rewrite(folder, settings)
    assert re.search(words, refused(nested(), folder))


TENSORS: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
    (lambda t: t.pop(B), f"tensor '{B}' is missing"),
    (lambda t: t.clear(), "target_modules names fc, of which there are no tensors"),
    (lambda t: t.update({A: t[A][:, :5].contiguous()}), r"\[4, 5\], expected \[4, 6\]"),
    (lambda t: t.update({A: t[A][:3].contiguous()}), r"\[3, 6\], expected \[4, 6\]"),
    (lambda t: t.update({B: t[B].t().contiguous()}), r"\[4, 6\], expected \[6, 4\]"),
    (lambda t: t[A].fill_(float("nan")), "holds NaN or infinity"),
    (lambda t: t.update({A: t[A].to(torch.int32)}), "int32"),
    (lambda t: t.update({A: t[A].to(torch.float8_e4m3fn)}), "float8"),
    (lambda t: t.update({A[11:]: t.pop(A)}), "does not start with 'base_model.model.'"),
    (lambda t: t.update({A + ".extra": t[B].clone()}), "does not belong to it"),
    (lambda t: t.update({A.replace("lora_A", "lora_C"): t[B].clone()}), "does not belong to it"),
    (lambda t: t.update({A.replace("A.", "A.default."): t[A].clone()}), "is there twice"),
    (lambda t: t.update({A.replace("fc", "f\nc"): t[A].clone()}), "no plain text"),
    (
        lambda t: t.update({A.replace("fc", "fc2"): t[A].clone()}),
        "nothing in Nested is called 'fc2'",
    ),
    (lambda t: t.update({A.replace("fc", "patch"): t[A].clone()}), "leaves patch out"),
    (lambda t: t.update({"base_model.model.fc.bias": torch.ones(6)}), r"fc\.bias \[6\], which is"),
    (lambda t: t.update({"base_model.model.no.bias": torch.ones(6)}), "belongs to no module"),
]


@pytest.mark.parametrize(("change", "words"), TENSORS, ids=[words for _, words in TENSORS])
def test_a_bad_tensor_is_one_line_that_names_it(
    change: Callable[[dict[str, Tensor]], object], words: str, folder: Path
) -> None:
    rewrite(folder, change=change)
    assert re.search(words, refused(nested(), folder))


def test_a_folder_that_is_none_is_said_to_be_none(folder: Path, tmp_path: Path) -> None:
    config, found = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    assert "there is no PEFT folder" in refused(nested(), tmp_path / "nowhere")
    assert "has no adapter_config.json" in refused(nested(), tmp_path)
    good = config.read_text()
    for broken in ("", "{", "[]", "3", '{"r": 1, "r": 2}', "[" * 100_000, '{"r": ' + "9" * 5000):
        config.write_text(broken)
        assert str(config) in refused(nested(), folder)
    config.write_bytes(b"\xff\xfe{}")
    assert "cannot be read as JSON" in refused(nested(), folder)
    config.write_text(good)
    content = found.read_bytes()
    for damaged in (b"", content[:100], content[:-4], b"\x80\x04N.", b"PK\x03\x04"):
        found.write_bytes(damaged)
        assert "is damaged or not a safetensors file" in refused(nested(), folder)
    found.rename(folder / "adapter_model.bin")
    assert "but adapter_model.bin: only safetensors are read" in refused(nested(), folder)


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        ("openai Whisper", "token_embedding", "TextDecoder reads token_embedding.weight itself in"),
        ("transformers Whisper", "embed_positions", "embed_positions"),
        ("nn.TransformerEncoder", "linear1", "TransformerEncoderLayer reads linear1.weight itself"),
        ("nn.TransformerEncoder", "out_proj", "MultiheadAttention reads out_proj.weight itself"),
    ],
)
def test_a_layer_where_peft_does_not_act_as_its_weight_would_is_refused(
    name: str, target: str, words: str, tmp_path: Path
) -> None:
    real = REALS[name]
    saved(peft_model(real.model(), [target]), tmp_path / "peft")
    assert words in refused(real.model(), tmp_path / "peft")
    ours = attach(real.model(), LoRA(rank=4), f"**.{target}")
    with pytest.raises(AdaptError, match=target):
        export_peft(ours, tmp_path / "ours")


def test_peft_is_wrong_there_which_is_why() -> None:
    whisper = REALS["openai Whisper"]
    made = peft_model(whisper.model(), ["token_embedding"])
    adapted = outputs(whisper, made.get_base_model())
    merged = outputs(whisper, made.merge_and_unload())
    assert apart(adapted, merged) > 0.1
    encoder = REALS["nn.TransformerEncoder"]
    plain = outputs(encoder, encoder.model())
    made = peft_model(encoder.model(), ["linear1"])
    assert torch.equal(outputs(encoder, made.get_base_model()), plain)  # never called


def test_a_tied_weight_is_refused(tmp_path: Path) -> None:
    saved(peft_model(gpt2_with_head(), ["wte"]), tmp_path)
    assert "is tied" in refused(gpt2_with_head(), tmp_path)


@pytest.mark.parametrize("layer", ["conv2d, dilated", "conv2d, grouped"])
def test_a_convolution_that_peft_treats_otherwise_is_refused(layer: str, tmp_path: Path) -> None:
    ours = attach(LAYERS[layer].model(), LoRA(rank=2), LAYERS[layer].at)
    with pytest.raises(AdaptError, match=r"convolution|groups="):
        export_peft(ours, tmp_path / "set")


def test_adalora_is_refused_where_peft_has_none(tmp_path: Path) -> None:
    made = peft_model(nested(), ["fc"], "AdaLoRA")
    saved(made, tmp_path)
    rewrite(tmp_path, {"use_rslora": True})
    assert "'use_rslora': True is no setting of ADALORA" in refused(nested(), tmp_path)
    rewrite(tmp_path, {"use_rslora": False, "rank_pattern": {"fc.lora_E": [True]}})
    assert "is not 4 times true or false" in refused(nested(), tmp_path)
    rewrite(tmp_path, {"rank_pattern": {"no.lora_E": [True] * 4}})
    assert "rank_pattern names 'no.lora_E'" in refused(nested(), tmp_path)


def test_methods_without_pefts_form_are_refused_by_name(tmp_path: Path) -> None:
    for recipe, at in ((BitFit(), "**.bias"), (AdaptFormer(rank=2), "h.*"), (HeadOnly(), None)):
        ours = attach(REALS["GPT-2"].model(), recipe, at)
        with pytest.raises(AdaptError, match=f"{type(recipe).__name__}|without sites"):
            export_peft(ours, tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_no_folder_is_overwritten_and_none_is_left_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = attach(nested(), LoRA(rank=2), "fc")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "empty").mkdir()
    for name, words in (("file", "no folder"), ("full", "not empty"), ("no/set", "does not exist")):
        with pytest.raises(AdaptError, match=words):
            export_peft(ours, tmp_path / name)
    before = sorted(tmp_path.rglob("*"))

    def fails(*args: object) -> None:
        raise OSError(28, "No space left on device")

    for step in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, fails)
            with pytest.raises(AdaptError, match="No space left on device"):
                export_peft(ours, tmp_path / "empty")
        assert sorted(tmp_path.rglob("*")) == before
    export_peft(ours, tmp_path / "empty")
    assert len(list((tmp_path / "empty").iterdir())) == 2


def test_a_set_that_peft_would_load_wrong_is_not_written(tmp_path: Path) -> None:
    ours = attach(nested(), LoRA(rank=2), "fc")
    ours.head = {"weight": torch.ones(2, 2)}
    with pytest.raises(AdaptError, match="has tensors of no module"):
        export_peft(ours, tmp_path / "set")
    ours.head = {"fc.weight": torch.ones(6, 6)}
    with pytest.raises(AdaptError, match="fc is adapted and lies in the set's head"):
        export_peft(ours, tmp_path / "set")
    ours.head = {}
    ours.state_dict()["fc/A"].fill_(float("inf"))
    with pytest.raises(AdaptError, match="holds NaN or infinity"):
        export_peft(ours, tmp_path / "set")
    ours.detach()
    with pytest.raises(AdaptError, match="detached"):
        export_peft(ours, tmp_path / "set")
    assert not list(tmp_path.iterdir())
