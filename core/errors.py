"""The errors a user can cause: each says what was asked, what was found, what is allowed."""

from __future__ import annotations

from typing import get_args


class AdaptError(ValueError):
    """Something that was asked cannot be done; the message is one line that names cause and mend.

    >>> raise AdaptError("rank 0 is not allowed: a rank is at least 1")
    Traceback (most recent call last):
        ...
    polyadapt.core.errors.AdaptError: rank 0 is not allowed: a rank is at least 1
    """


class SiteError(AdaptError):
    """A pattern or a site does not fit the backbone."""


class StoreError(AdaptError):
    """An adapter file is missing, damaged, foreign or does not fit the backbone."""


class ReplayError(AdaptError):
    """A recomputed forward cannot tell which adapter sets its first forward used."""


def require_word(setting: str, value: object, words: object) -> None:
    """Refuse a value that is none of the words of a `Literal`.

    >>> from typing import Literal
    >>> require_word("order", "rows", Literal["rows", "columns"])
    """
    if value not in (allowed := get_args(words)):
        raise AdaptError(f"{setting}={value!r} is not allowed: {', '.join(allowed)}")
