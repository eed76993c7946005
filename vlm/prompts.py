"""Prompts: one sentence for each class, which the text tower turns into the classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..core.errors import AdaptError

SLOT = "{}"
COMMON = "a photo of a {}."

TEMPLATES: Mapping[str, str] = {
    "imagenet": COMMON,
    "sun397": COMMON,
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "eurosat": "a centered satellite photo of {}.",
    "stanford_cars": COMMON,
    "food101": "a photo of {}, a type of food.",
    "oxford_pets": "a photo of a {}, a type of pet.",
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "caltech101": COMMON,
    "dtd": "{} texture.",
    "ucf101": "a photo of a person doing {}.",
}
"""The template of each data set of CoOp's protocol (arXiv 2109.01134). CLIP-LoRA's published rows
use COMMON for all of them, so numbers of a table must say which."""

IMAGENET_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""CLIP's seven for ImageNet, whose features are averaged (arXiv 2103.00020)."""


def template_of(said: str) -> str:
    """A template, or that of a data set by its name in TEMPLATES; `AdaptError` without one slot.

    >>> template_of("dtd"), template_of("art of a {}")
    ('{} texture.', 'art of a {}')
    """
    template = TEMPLATES.get(said, said)
    found = template.count(SLOT)
    if found != 1:
        raise AdaptError(
            f"the template {said!r} has {found} slots {SLOT}: one is wanted, as in {COMMON!r}, or"
            f" the name of a data set: {', '.join(TEMPLATES)}"
        )
    return template


def class_prompts(classes: Sequence[str], template: str = COMMON) -> tuple[str, ...]:
    """A prompt for each class: `_` becomes a space, every other character stays as it is.

    Raises `AdaptError` for fewer than two classes, an empty name, the same name twice.

    >>> class_prompts(["tabby_cat", "Größe {1}"])
    ('a photo of a tabby cat.', 'a photo of a Größe {1}.')
    """
    template = template_of(template)
    if len(classes) < 2:
        raise AdaptError(f"a classifier needs at least two classes, got {list(classes)}")
    seen: dict[str, str] = {}
    for name in classes:
        words = " ".join(name.replace("_", " ").split())
        if not words:
            raise AdaptError(f"a class is called {name!r}: there is nothing to read")
        if words in seen:
            raise AdaptError(f"the class {name!r} is there twice, the other as {seen[words]!r}")
        seen[words] = name
    return tuple(template.replace(SLOT, name.replace("_", " ")) for name in classes)


def class_tokens(
    tokenize: Callable[[Sequence[str]], Tensor], classes: Sequence[str], template: str = COMMON
) -> Tensor:
    """The prompts as tokens [classes, context]; two that the tokenizer cannot tell are refused.

    So are "Cat" and "cat" for CLIP's, which reads lower case, and signs that a vocabulary lacks.
    """
    tokens = tokenize(class_prompts(classes, template))
    seen: dict[tuple[int, ...], str] = {}
    for name, row in zip(classes, tokens.tolist(), strict=True):
        other = seen.setdefault(tuple(row), name)
        if other is not name:
            raise AdaptError(f"the classes {other!r} and {name!r} are the same to the tokenizer")
    return tokens
