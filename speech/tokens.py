"""Text as Whisper's tokens: the prompt, what the decoder reads, what it shall say next."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import AdaptError

IGNORED = -100  # a target that the cross-entropy leaves out

Pair = tuple[list[int], list[int]]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the first tokens tell the decoder: language, task, with or without timestamps."""

    language: str = "en"
    task: str = "transcribe"
    timestamps: bool = False


class Tokens:
    """openai-whisper's tokens for a vocabulary of `n_vocab` and one prompt.

    The decoder reads `prompt + text` and is taught to say the same, one further, then `eot`:
    inputs [sot, language, task, no timestamps, text...], targets [language, ..., text..., eot].
    An English-only vocabulary (51864) has neither language nor task. The text starts with a space,
    as all of Whisper's do; words such as <|endoftext|> in it stay plain text.

    Raises AdaptError for an unknown language or task, another language than English or another
    task than transcribe with an English-only vocabulary, an empty text, and a pair longer than the
    decoder's `room`.

    >>> tokens = Tokens(51865)
    >>> tokens.pair("hello")
    ([50258, 50259, 50359, 50363, 7751], [50259, 50359, 50363, 7751, 50257])
    >>> tokens.text([7751, 50257])
    ' hello'
    """

    def __init__(self, n_vocab: int, prompt: Prompt | None = None, room: int = 448) -> None:
        self.asked = prompt or Prompt()
        self.room = room
        self.tokenizer = tokenizer_of(n_vocab, self.asked.language, self.asked.task)
        first = self.tokenizer.sot_sequence
        last = () if self.asked.timestamps else (self.tokenizer.no_timestamps,)
        self.prompt: tuple[int, ...] = (*first, *last)
        self.eot: int = self.tokenizer.eot

    def pair(self, text: str, seconds: float | None = None) -> Pair:
        """(inputs, targets) of one text, equally long; `seconds` is where its speech ends.

        With timestamps in the prompt the text stands between <|0.00|> and that of `seconds`.
        """
        body = self._body(text, seconds)
        if len(self.prompt) + len(body) > self.room:
            raise AdaptError(
                f"the transcript has {len(self.prompt) + len(body)} tokens with its prompt, the"
                f" decoder takes {self.room}: cut the clip and its text ({_start(text)})"
            )
        inputs = [*self.prompt, *body]
        return inputs, [*inputs[1:], self.eot]

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones and timestamps."""
        found: str = self.tokenizer.decode([i for i in ids if i < self.eot])
        return found

    def _body(self, text: str, seconds: float | None) -> list[int]:
        words = text.strip()
        if not words:
            raise AdaptError("the transcript is empty: leave the clip out, or give its text")
        ids: list[int] = self.tokenizer.encode(f" {words}", disallowed_special=())
        if not self.asked.timestamps:
            return ids
        if seconds is None or not 0 < seconds <= 30:
            raise AdaptError(f"a text with timestamps ends after 0 to 30 s, not {seconds}")
        first = self.tokenizer.timestamp_begin
        return [first, *ids, first + round(seconds / 0.02)]


def collate(pairs: Sequence[Pair], eot: int, masked: int = 0) -> tuple[Tensor, Tensor]:
    """Pairs of different lengths -> inputs [b, t] and targets [b, t], padded on the right.

    Padding is `eot` among the inputs, where the causal mask keeps it from acting, and -100 among
    the targets, by length: an `eot` that is a target stays one. `masked` further targets at the
    front are -100 (`len(tokens.prompt) - 1` for a prompt that is always given).

    >>> collate([([1, 2], [2, 9]), ([1, 2, 3], [2, 3, 9])], eot=9)[1]
    tensor([[   2,    9, -100],
            [   2,    3,    9]])
    """
    width = max(len(inputs) for inputs, _ in pairs)
    inputs = [line + [eot] * (width - len(line)) for line, _ in pairs]
    targets = [
        [IGNORED] * masked + line[masked:] + [IGNORED] * (width - len(line)) for _, line in pairs
    ]
    return torch.tensor(inputs), torch.tensor(targets)


def tokenizer_of(n_vocab: int, language: str, task: str) -> Any:
    """openai-whisper's tokenizer for a vocabulary, a language (code or name) and a task."""
    from whisper.tokenizer import get_tokenizer

    if task not in ("transcribe", "translate"):
        raise AdaptError(f"task {task!r} is unknown: allowed are 'transcribe' and 'translate'")
    multilingual, languages = n_vocab >= 51865, n_vocab - 51765 - (n_vocab >= 51865)
    code = language_code(language, n_vocab)
    if not multilingual and task != "transcribe":
        raise AdaptError("an English-only Whisper (tiny.en, base.en, ...) cannot translate")
    with warnings.catch_warnings():
        # whisper leaves its vocabulary file to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        return get_tokenizer(multilingual, num_languages=languages, language=code, task=task)


def language_code(language: str, n_vocab: int) -> str:
    """'German' or 'de' -> 'de', if a model with this vocabulary speaks it.

    >>> language_code("German", 51865)
    'de'
    """
    from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE

    word = language.lower()
    code: str = TO_LANGUAGE_CODE.get(word, word)
    if code not in LANGUAGES:
        raise AdaptError(f"Whisper knows no language {language!r}; it takes codes such as en, de")
    if n_vocab < 51865 and code != "en":
        raise AdaptError(
            f"this Whisper is English-only (tiny.en, base.en, ...) and cannot take the language"
            f" {language!r}: choose a multilingual model"
        )
    if n_vocab >= 51865 and list(LANGUAGES).index(code) >= n_vocab - 51766:
        raise AdaptError(f"this Whisper has no token for the language {language!r}")
    return code


def _start(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= 40 else f"{words[:40]}...")
