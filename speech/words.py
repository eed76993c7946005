"""Transcripts as they are compared: normalised on both sides, errors summed over a corpus."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from ..core.errors import AdaptError

Style = Literal["auto", "english", "basic", "plain"]

# Written with combining marks that Whisper's basic normaliser takes for punctuation, so that
# words fall to pieces: Indic scripts, Thai, Lao, Khmer, Burmese, Tibetan.
_MARKED = {"as", "bn", "gu", "hi", "kn", "ml", "mr", "ne", "pa", "sa", "sd", "si", "ta", "te"}
_MARKED |= {"bo", "km", "lo", "my", "th"}


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """Whisper's normalisers, as settings.

    `style`: `english` (numbers as digits, British as American spelling, contractions spelled out,
    fillers and bracketed words removed), `basic` (lower case, symbols as blanks), `plain` (the
    same, but combining vowel signs are kept), `auto`: english for en, plain for Indic and similar
    scripts, basic for the rest. `digits` splits runs of digits, as spoken digits are scored one by
    one; `letters` splits letters (Chinese, Japanese: the word error rate is then one of letters).

    >>> Normaliser()("Mr. Jones won't pay twenty one colours, um, okay?")
    'mister jones will not pay 21 colors okay'
    >>> Normaliser(digits=True)("Seven, three. Twenty one! 1")
    '7 3 2 1 1'
    >>> Normaliser(letters=True)("你好 世界", language="zh")
    '你 好 世 界'
    """

    style: Style = "auto"
    digits: bool = False
    letters: bool = False

    def __post_init__(self) -> None:
        if self.style not in get_args(Style):
            allowed = ", ".join(get_args(Style))
            raise AdaptError(f"normaliser style {self.style!r} is not allowed: {allowed}")

    def __call__(self, text: str, language: str = "en") -> str:
        """One text of a language (its code) as words with single blanks between them."""
        style = _automatic(language) if self.style == "auto" else self.style
        found = _whisper(style, self.letters)(text)
        if self.digits:
            if style == "english":  # which writes "one" and "1" as "one", but "twenty one" as 21
                found = re.sub(r"\bone\b", "1", found)
            found = re.sub(r"(\d)", r" \1 ", found)
        return " ".join(found.split())


@dataclass(frozen=True)
class Counts:
    """Edits and reference lengths of one or more clips; `+` joins them.

    `silent` clips have a reference without a word after normalising: what was heard in them,
    `heard` words, belongs to no rate.

    >>> Counts(edits=1, words=2, letter_edits=1, letters=3) + Counts(1, 1, 2, 1)
    Counts(edits=2, words=3, letter_edits=3, letters=4, silent=0, heard=0)
    """

    edits: int = 0
    words: int = 0
    letter_edits: int = 0
    letters: int = 0
    silent: int = 0
    heard: int = 0

    def __add__(self, other: Counts) -> Counts:
        mine, theirs = self.as_tuple(), other.as_tuple()
        return Counts(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def as_tuple(self) -> tuple[int, ...]:
        """The numbers in the order of the fields."""
        rates = (self.edits, self.words, self.letter_edits, self.letters)
        return (*rates, self.silent, self.heard)

    @property
    def wer(self) -> float:
        """Edits per word of the reference; NaN without one."""
        return self.edits / self.words if self.words else float("nan")

    @property
    def cer(self) -> float:
        """Edits per letter of the reference (blanks count); NaN without one."""
        return self.letter_edits / self.letters if self.letters else float("nan")


def count(said: str, truth: str, normaliser: Normaliser, language: str = "en") -> Counts:
    """The errors of one clip, both sides normalised.

    >>> count("A x.", "a b", Normaliser())
    Counts(edits=1, words=2, letter_edits=1, letters=3, silent=0, heard=0)
    >>> count("Thank you", "[noise]", Normaliser())
    Counts(edits=0, words=0, letter_edits=0, letters=0, silent=1, heard=2)
    """
    said, truth = normaliser(said, language), normaliser(truth, language)
    if not truth:
        return Counts(silent=1, heard=len(said.split()))
    words = truth.split()
    return Counts(edits(said.split(), words), len(words), edits(said, truth), len(truth))


def edits(said: Sequence[str], truth: Sequence[str]) -> int:
    """Insertions, deletions and substitutions that make `truth` of `said` (Levenshtein).

    >>> edits("kitten", "sitting"), edits([], ["a", "b"])
    (3, 2)
    """
    row = list(range(len(truth) + 1))
    for i, unit in enumerate(said, start=1):
        diagonal, row[0] = row[0], i
        for j, wanted in enumerate(truth, start=1):
            kept = diagonal + (unit != wanted)
            diagonal, row[j] = row[j], min(kept, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def _automatic(language: str) -> Style:
    if language == "en":
        return "english"
    return "plain" if language in _MARKED else "basic"


@cache
def _whisper(style: str, letters: bool) -> Callable[[str], str]:
    from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

    if style == "plain":
        return _plain
    with warnings.catch_warnings():
        # whisper leaves its file of spellings to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        made: Callable[[str], str] = (
            EnglishTextNormalizer() if style == "english" else BasicTextNormalizer(False, letters)
        )
    return made


def _plain(text: str) -> str:
    """Lower case; punctuation and symbols are blanks, marks stay."""
    lowered = unicodedata.normalize("NFKC", text).lower()
    return "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in lowered)
