"""The errors a user can cause: each says what was asked, what was found, what is allowed."""

from __future__ import annotations


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
