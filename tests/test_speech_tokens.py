"""Texts as Whisper's tokens, and batches of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from polyadapt.core.errors import AdaptError
from polyadapt.speech.tokens import Prompt, Tokens, collate, language_code

ENGLISH, MULTILINGUAL, LARGE_V3 = 51864, 51865, 51866


def test_a_multilingual_pair_is_the_published_tokens() -> None:
    inputs, targets = Tokens(MULTILINGUAL, Prompt(language="en")).pair("hello")
    assert inputs == [50258, 50259, 50359, 50363, 7751]
    assert targets == [50259, 50359, 50363, 7751, 50257]


def test_with_a_hundred_languages_everything_from_transcribe_on_is_one_more() -> None:
    inputs, targets = Tokens(LARGE_V3).pair("hello")
    assert inputs == [50258, 50259, 50360, 50364, 7751]
    assert targets[-1] == 50257


def test_english_only_has_neither_language_nor_task() -> None:
    tokens = Tokens(ENGLISH)
    inputs, targets = tokens.pair("hello")
    assert inputs[:2] == [50257, 50362]
    assert targets == [50362, *inputs[2:], 50256]
    assert tokens.eot == 50256
    assert tokens.text(targets) == " hello"


def test_a_text_starts_with_one_space_however_it_is_given() -> None:
    tokens = Tokens(MULTILINGUAL)
    assert tokens.pair("  hello \n") == tokens.pair("hello")


def test_language_and_task_choose_their_tokens() -> None:
    asked = Prompt(language="German", task="translate")
    assert Tokens(MULTILINGUAL, asked).prompt == (50258, 50261, 50358, 50363)
    assert Tokens(LARGE_V3, Prompt(language="yue")).prompt[1] == 50358  # the hundredth language


def test_timestamps_stand_around_the_text() -> None:
    tokens = Tokens(MULTILINGUAL, Prompt(timestamps=True))
    inputs, targets = tokens.pair("hello", seconds=1.5)
    assert inputs == [50258, 50259, 50359, 50364, 7751, 50364 + 75]
    assert targets[-2:] == [50364 + 75, 50257]
    for seconds in (None, 0.0, 30.1):
        with pytest.raises(AdaptError, match="a text with timestamps ends after 0 to 30 s"):
            tokens.pair("hello", seconds=seconds)


def test_special_words_in_a_text_stay_plain_text() -> None:
    inputs, _ = Tokens(MULTILINGUAL).pair("<|endoftext|>")
    assert max(inputs[4:]) < 50257


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_an_empty_transcript_is_refused(text: str) -> None:
    with pytest.raises(AdaptError, match="the transcript is empty"):
        Tokens(ENGLISH).pair(text)


def test_448_tokens_fit_and_449_do_not() -> None:
    tokens = Tokens(ENGLISH)
    inputs, targets = tokens.pair("a " * 446)
    assert len(inputs) == len(targets) == 448
    with pytest.raises(AdaptError, match="has 449 tokens with its prompt, the decoder takes 448"):
        tokens.pair("a " * 447)


def test_an_english_model_given_another_language_is_refused_by_name() -> None:
    with pytest.raises(AdaptError, match=r"English-only \(tiny\.en, .*the language 'de'"):
        Tokens(ENGLISH, Prompt(language="de"))
    with pytest.raises(AdaptError, match=r"English-only .* cannot translate"):
        Tokens(ENGLISH, Prompt(task="translate"))
    assert language_code("English", ENGLISH) == "en"


def test_unknown_languages_and_tasks_are_refused() -> None:
    with pytest.raises(AdaptError, match="no language 'klingon'"):
        Tokens(MULTILINGUAL, Prompt(language="klingon"))
    with pytest.raises(AdaptError, match="no token for the language 'yue'"):
        Tokens(MULTILINGUAL, Prompt(language="yue"))
    with pytest.raises(AdaptError, match="task 'sing' is unknown"):
        Tokens(MULTILINGUAL, Prompt(task="sing"))


def test_of_lengths_5_and_8_exactly_3_targets_are_ignored_and_eot_never() -> None:
    short = (list(range(5)), [1, 2, 3, 4, 99])
    long = (list(range(8)), [1, 2, 3, 4, 5, 6, 7, 99])
    inputs, targets = collate([short, long], eot=99)
    assert inputs.tolist() == [[0, 1, 2, 3, 4, 99, 99, 99], list(range(8))]
    assert targets.tolist() == [[1, 2, 3, 4, 99, -100, -100, -100], [1, 2, 3, 4, 5, 6, 7, 99]]
    logits = torch.zeros(16, 100)
    assert float(F.cross_entropy(logits, targets.flatten())) == pytest.approx(4.60517)  # ln 100


def test_targets_of_the_prompt_are_masked_on_request() -> None:
    tokens = Tokens(MULTILINGUAL)
    _, targets = collate([tokens.pair("hello")], tokens.eot, masked=len(tokens.prompt) - 1)
    assert targets.tolist() == [[-100, -100, -100, 7751, 50257]]
