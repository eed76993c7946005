"""Backbones as settings that travel as JSON, and what cannot be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from polyadapt.core.errors import AdaptError
from polyadapt.speech.backbones import (
    Backbone,
    OfflineTinyEn,
    OpenAIWhisper,
    TransformersWhisper,
)
from polyadapt.speech.convert import as_transformers
from polyadapt.speech.model import speech_of
from polyadapt.tests.speech_models import tiny_whisper


@pytest.mark.parametrize(
    "backbone",
    [
        OpenAIWhisper(name="tiny.en"),
        TransformersWhisper(name="openai/whisper-small"),
        OfflineTinyEn(),
        OfflineTinyEn(layout="transformers"),
    ],
)
def test_a_backbone_comes_back_from_its_json(backbone: Backbone) -> None:
    assert Backbone.from_json(backbone.to_json()) == backbone


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "names no backbone; there are OpenAIWhisper"),
        ({"backbone": "TinyViT"}, "names no backbone"),
        ({"backbone": "OpenAIWhisper"}, "has the settings .*see 'name'"),
        ({"backbone": "OpenAIWhisper", "name": 3}, "name is a str, not 3"),
        ({"backbone": "OpenAIWhisper", "name": "a", "size": "b"}, "see 'size'"),
        ({"backbone": "OfflineTinyEn", "layout": "jax"}, "layout 'jax' is unknown"),
    ],
)
def test_json_that_names_no_backbone_is_refused(data: Any, message: str) -> None:
    with pytest.raises(AdaptError, match=message):
        Backbone.from_json(data)


def test_weights_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"no weights")
    cases = [
        (OpenAIWhisper(name="tiny.klingon"), "openai-whisper cannot load Whisper 'tiny.klingon'"),
        (OpenAIWhisper(name=str(tmp_path / "a.pt")), "openai-whisper cannot load"),
        (TransformersWhisper(name=str(tmp_path)), "transformers cannot load"),
    ]
    for backbone, message in cases:
        with pytest.raises(AdaptError, match=message) as caught:
            backbone.build()
        assert "\n" not in str(caught.value)


def test_a_file_of_openai_and_a_folder_of_transformers_are_loaded(tmp_path: Path) -> None:
    model = tiny_whisper()
    kept = {"dims": vars(model.dims), "model_state_dict": model.state_dict()}
    torch.save(kept, tmp_path / "tiny.pt")
    as_transformers(model).save_pretrained(tmp_path / "folder")
    one = OpenAIWhisper(name=str(tmp_path / "tiny.pt")).build()
    other = TransformersWhisper(name=str(tmp_path / "folder")).build()
    assert not one.training
    assert not other.training
    mel, tokens = torch.ones(1, 80, 100), torch.tensor([[50257, 50362]])
    with torch.no_grad():
        first, second = (s.logits(tokens, s.encode(mel)) for s in map(speech_of, (one, other)))
    assert torch.allclose(first, second, atol=1e-5 * float(first.abs().max()))
