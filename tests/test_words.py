"""Transcripts are compared as Whisper's normaliser writes them; errors are summed over a corpus."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.text import CharErrorRate, WordErrorRate

from polyadapt.core.errors import AdaptError
from polyadapt.speech.words import Counts, Normaliser, count, edits

PLAIN = Normaliser(style="plain")
sentences = st.text("ab ", max_size=12)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Mr. O'Brien won't pay $20.50, um, okay?", "mister 0 brien will not pay $20.50 okay"),
        ("twenty one colours", "21 colors"),
        ("[laughter] uh, yes", "yes"),
        ("  ", ""),
    ],
)
def test_english_is_written_as_whispers_normaliser_does(text: str, said: str) -> None:
    assert Normaliser()(text) == said


@pytest.mark.parametrize("text", ["seven three", "73", "Seven, 3.", "seventy three", "7-3"])
def test_digits_are_split_however_they_were_written(text: str) -> None:
    assert Normaliser(digits=True)(text) == "7 3"


@pytest.mark.parametrize("text", ["one", "1.", "One!"])
def test_one_is_a_digit_like_the_others(text: str) -> None:
    assert Normaliser(digits=True)(text) == "1"
    assert Normaliser()(text) == "one"


def test_vowel_signs_of_indic_scripts_are_kept() -> None:
    assert Normaliser()("हिन्दी में।", language="hi") == "हिन्दी में"
    assert Normaliser(style="basic")("हिन्दी में") == "ह न द म"


def test_other_languages_keep_their_number_words() -> None:
    assert Normaliser()("Zwei Äpfel, bitte!", language="de") == "zwei äpfel bitte"


def test_letters_can_be_counted_as_words() -> None:
    assert count("你好世", "你好 世界", Normaliser(letters=True), "zh").wer == 1 / 4


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(AdaptError, match="style 'french' is not allowed: auto, english"):
        Normaliser(style="french")  # type: ignore[arg-type]


def test_the_rate_is_of_the_corpus_and_not_a_mean_over_clips() -> None:
    found = count("a x", "a b", PLAIN) + count("c d", "c", PLAIN)
    assert found.wer == 2 / 3  # the mean over clips would be 3 / 4


def test_references_without_a_word_are_counted_apart() -> None:
    found = count("Thank you.", "[noise]", Normaliser()) + count("", "(cough)", Normaliser())
    assert found == Counts(silent=2, heard=2)
    assert math.isnan(found.wer)
    assert (found + count("a", "a", PLAIN)).wer == 0


def test_nothing_heard_is_one_deletion_per_word() -> None:
    assert count("", "a b c", PLAIN).wer == 1
    assert count("", "abc", PLAIN).cer == 1


@given(st.lists(st.tuples(sentences, sentences), min_size=1, max_size=4))
def test_rates_are_those_of_torchmetrics(pairs: list[tuple[str, str]]) -> None:
    pairs = [(PLAIN(said), PLAIN(truth)) for said, truth in pairs]
    kept = [(said, truth) for said, truth in pairs if truth]
    found = sum((count(said, truth, PLAIN) for said, truth in pairs), Counts())
    assert found.silent == len(pairs) - len(kept)
    if kept:
        said, truth = map(list, zip(*kept, strict=True))
        assert found.wer == pytest.approx(float(WordErrorRate()(said, truth)))
        assert found.cer == pytest.approx(float(CharErrorRate()(said, truth)))


@given(sentences, sentences)
def test_edits_are_symmetric_and_bounded(one: str, other: str) -> None:
    assert edits(one, other) == edits(other, one)
    assert abs(len(one) - len(other)) <= edits(one, other) <= max(len(one), len(other))
