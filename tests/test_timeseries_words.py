"""A backbone in one word, and the places where several verbs take it."""

from __future__ import annotations

import pytest

from polyadapt.core.cli import main
from polyadapt.core.errors import AdaptError
from polyadapt.timeseries.backbone_words import backbone_called
from polyadapt.timeseries.backbones import (
    GPT2,
    LanguageModel,
    NoLanguageModel,
    OfflineMiniLM,
    OneAttention,
)


def test_a_word_is_a_backbone_with_so_many_blocks() -> None:
    assert backbone_called("minilm", None) == OfflineMiniLM(blocks=6)
    assert backbone_called("minilm", None, usual=3) == OfflineMiniLM(blocks=3)
    assert backbone_called("gpt2", 2) == GPT2(blocks=2)
    assert backbone_called("bert-base-uncased", 1) == LanguageModel(
        name="bert-base-uncased", blocks=1
    )
    assert backbone_called("none", None) == NoLanguageModel()
    assert backbone_called("attention", None) == OneAttention()


def test_what_has_no_blocks_takes_no_number_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AdaptError, match="--blocks 3 is of a language model, and 'none' is none"):
        backbone_called("none", 3)
    assert main(["timeseries", "sites", "attention", "--blocks", "2"]) == 2
    assert "and 'attention' is none" in capsys.readouterr().err
