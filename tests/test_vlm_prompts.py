"""Prompts of classes: templates, what becomes of names, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.vlm.prompts import (
    COMMON,
    IMAGENET_TEMPLATES,
    TEMPLATES,
    class_prompts,
    class_tokens,
    template_of,
)


def lower_case(texts: Sequence[str]) -> Tensor:
    """Tokens as CLIP's: what differs in capitals only is the same; what is no ASCII, unknown."""
    codes = [[min(ord(sign), 128) for sign in text.lower()] for text in texts]
    longest = max(map(len, codes))
    return torch.tensor([row + [0] * (longest - len(row)) for row in codes])


def test_there_is_a_template_for_each_of_the_eleven_data_sets() -> None:
    assert len(TEMPLATES) == 11
    assert all(template_of(template) == template for template in TEMPLATES.values())
    assert len({template_of(template) for template in IMAGENET_TEMPLATES}) == 7


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        ("oxford_pets", "a photo of a Maine Coon, a type of pet."),
        ("food101", "a photo of Maine Coon, a type of food."),
        ("dtd", "Maine Coon texture."),
        ("caltech101", "a photo of a Maine Coon."),
    ],
)
def test_a_data_set_s_name_stands_for_its_template(data: str, prompt: str) -> None:
    assert class_prompts(["Maine_Coon", "b"], data)[0] == prompt


def test_odd_characters_are_kept() -> None:
    odd = ["naïve 猫", "{0}", "{}", "50% off\\n", "'", "a{b}c", "🦄"]
    assert class_prompts(odd, COMMON) == tuple(f"a photo of a {name}." for name in odd)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("a photo", "'a photo' has 0 slots"),
        ("{} and {}", "'{} and {}' has 2 slots"),
        ("a {name}", "'a {name}' has 0 slots"),
        ("", "'' has 0 slots"),
        ("oxford_cats", "'oxford_cats' has 0 slots"),
    ],
)
def test_a_template_has_one_slot(template: str, said: str) -> None:
    with pytest.raises(AdaptError) as refused:
        class_prompts(["cat", "dog"], template)
    assert said in str(refused.value)
    assert "oxford_pets" in str(refused.value)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ([], "at least two classes, got \\[\\]"),
        (["cat"], "at least two classes, got \\['cat'\\]"),
        (["cat", "dog", "cat"], "the class 'cat' is there twice, the other as 'cat'"),
        (["sea_lion", "sea lion"], "the class 'sea lion' is there twice, the other as 'sea_lion'"),
        (["cat", " cat"], "the class ' cat' is there twice"),
        (["cat", "_ "], "a class is called '_ ': there is nothing to read"),
        (["cat", "\n"], "a class is called '\\\\n'"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused(classes: list[str], said: str) -> None:
    with pytest.raises(AdaptError, match=said) as refused:
        class_prompts(classes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("classes", [["cat", "dog", "CAT"], ["猫", "dog", "犬"]])
def test_classes_that_the_tokenizer_cannot_tell_are_refused(classes: list[str]) -> None:
    said = f"'{classes[0]}' and '{classes[2]}' are the same to the tokenizer"
    with pytest.raises(AdaptError, match=said):
        class_tokens(lower_case, classes)


def test_tokens_are_those_of_the_prompts_in_order() -> None:
    tokens = class_tokens(lower_case, ["ab", "c_d"], "{}.")
    assert tokens.tolist() == [[97, 98, 46, 0], [99, 32, 100, 46]]
