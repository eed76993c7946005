"""Shows docstrings as they are meant: examples and aligned tables become blocks of code.

mkdocstrings loads the class below. Our docstrings are plain text, and Markdown would run such lines
together, or read `[0]` after `x[1]` as a link.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_EXAMPLE = re.compile(r"^(>>> .*?)(?=\n\s*\n|\s*\Z)", re.DOTALL | re.MULTILINE)
_TABLE = re.compile(r"^(={4,} +=.*?)(?=\n\s*\n|\s*\Z)", re.DOTALL | re.MULTILINE)


class Blocks(Extension):
    """Rewrites the docstring of every object that griffe has read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """The docstring with its examples and tables fenced."""
    fenced = _EXAMPLE.sub(r"```pycon\n\1\n```", text)
    return _TABLE.sub(r"```text\n\1\n```", fenced)
