"""Where the attention projections of image-text towers are, whoever wrote the tower."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal, get_args

from torch import nn

from ..core.drawer import own_modules
from ..core.errors import AdaptError, require_word

Encoder = Literal["both", "text", "vision"]
Layers = Literal["all", "bottom", "mid", "up", "half-up", "half-bottom", "top3"]
Part = Literal["q", "k", "v", "o"]
PARTS = get_args(Part)

# The module that holds a tower's blocks: open_clip's classes, then those of transformers. CLIP
# unpacks its text tower into itself, so there the blocks alone have a name.
_TOWERS = {"vision": ("visual", "vision_model"), "text": ("text", "text_model", "transformer")}
_OF_VISION = ("visual", "vision_model", "visual_projection")

# What an attention calls q, k, v and the output projection. The first whose four are there counts.
_LAYOUTS = (
    ("in_proj_weight[q]", "in_proj_weight[k]", "in_proj_weight[v]", "out_proj"),  # torch, open_clip
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # split, transformers' CLIP and SigLIP
    ("q_proj", "k_proj", "v_proj", "proj"),  # timm's EVA
    ("q_proj", "k_proj", "v_proj", "c_proj"),  # the pooler of CLIP's ResNets
    ("qkv[q]", "qkv[k]", "qkv[v]", "proj"),  # timm
    ("self.query", "self.key", "self.value", "output.dense"),  # BERT, RoBERTa, XLM-R
    ("q", "k", "v", "o"),  # mT5
)


def sites_for(
    model: nn.Module,
    encoder: Encoder = "both",
    parts: Sequence[str] = ("q", "k", "v"),
    layers: Layers = "all",
) -> list[str]:
    """Patterns for `attach(..., at=...)` of the attention projections of one tower or both.

    `model`: open_clip's CLIP (split or not), CustomTextCLIP or CoCa with timm and Hugging Face
    towers, transformers' CLIPModel or SiglipModel. `parts`: of q, k, v, o. `layers`: all; the
    thirds bottom, mid and up; half-bottom and half-up; top3, the last three (the presets of
    CLIP-LoRA, arXiv 2405.18541; a third is rounded down from below).
    Raises `AdaptError` for other words, a tower without attention, and too few layers.

    >>> from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg
    >>> eye = CLIPVisionCfg(layers=2, width=16, head_width=8, patch_size=8, image_size=16)
    >>> reader = CLIPTextCfg(context_length=4, vocab_size=20, width=16, heads=2, layers=2)
    >>> sites_for(CLIP(8, eye, reader), "vision", ("q", "v", "o"))  # doctest: +NORMALIZE_WHITESPACE
    ['visual.transformer.resblocks.{0,1}.attn.in_proj_weight[q,v]',
     'visual.transformer.resblocks.{0,1}.attn.out_proj']
    """
    require_word("encoder", encoder, Encoder)
    require_word("layers", layers, Layers)
    if not parts:
        raise AdaptError(f"parts name at least one of {', '.join(PARTS)}")
    for part in parts:
        require_word("parts", part, Part)
    towers = ("vision", "text") if encoder == "both" else (encoder,)
    return [pattern for tower in towers for pattern in _of_tower(model, tower, parts, layers)]


def encoder_of(path: str) -> Literal["text", "vision"]:
    """The tower that a module path of an image-text model is in.

    >>> encoder_of("visual.transformer.resblocks.0.attn"), encoder_of("transformer.resblocks.0")
    ('vision', 'text')
    """
    return "vision" if path.split(".")[0] in _OF_VISION else "text"


def _of_tower(model: nn.Module, tower: str, parts: Sequence[str], layers: Layers) -> Iterator[str]:
    found = _attentions(model, tower)
    start, stop = _span(layers, len(found))
    if start == stop:
        raise AdaptError(
            f"layers={layers!r} is not allowed here: the {tower} tower has only {len(found)}"
        )
    for (before, after, layout), group in groupby(found[start:stop], _around_number):
        numbers = ",".join(_around(path)[1] for path, _ in group)
        path = f"{before}{{{numbers}}}{after}" if numbers else before
        yield from (f"{path}.{name}" for name in _written(layout, parts))


def _attentions(model: nn.Module, tower: str) -> list[tuple[str, tuple[str, ...]]]:
    """(path, layout) of the attentions in a tower's blocks, in order.

    Blocks stand in a numbered list and poolers do not; a tower of other blocks, such as CLIP's
    ResNet, has its pooler alone.
    """
    root = next((name for name in _TOWERS[tower] if name in model._modules), None)
    if root is None:
        raise AdaptError(
            f"{type(model).__name__} has no {tower} tower that we know: open_clip's and"
            " transformers' image-text models have"
        )
    found = [
        (f"{root}.{path}", layout)
        for path, module in own_modules(model._modules[root])  # type: ignore[arg-type]
        if (layout := _layout_of(module)) is not None
    ]
    numbered = [place for place in found if _around(place[0])[1]]
    if not found:
        raise AdaptError(
            f"the {tower} tower ({type(model._modules[root]).__name__}) has no attention with"
            f" projections that we know; name its layers yourself"
        )
    return numbered or found


def _layout_of(module: nn.Module) -> tuple[str, ...] | None:
    for layout in _LAYOUTS:
        if all(_holds(module, name.partition("[")[0]) for name in layout):
            return layout
    return None


def _holds(module: nn.Module, name: str) -> bool:
    """A parameter, or a module with a weight, of that name below."""
    *above, last = name.split(".")
    for step in above:
        child = module._modules.get(step)
        if child is None:
            return False
        module = child
    layer = module._modules.get(last)
    held = module._parameters.get(last) if layer is None else layer._parameters.get("weight")
    return held is not None


def _around(path: str) -> tuple[str, str, str]:
    """The path before its last number, that number, and what follows.

    >>> _around("visual.blocks.11.attn"), _around("visual.attnpool")
    (('visual.blocks.', '11', '.attn'), ('visual.attnpool', '', ''))
    """
    found = re.fullmatch(r"(.*\.)(\d+)((?:\.[^.]*[^.\d][^.]*)*)", path)
    return (found[1], found[2], found[3]) if found else (path, "", "")


def _around_number(place: tuple[str, tuple[str, ...]]) -> tuple[str, str, tuple[str, ...]]:
    before, _, after = _around(place[0])
    return before, after, place[1]


def _written(layout: tuple[str, ...], parts: Sequence[str]) -> Iterator[str]:
    """The wanted projections as ends of patterns, those of one fused matrix together."""
    wanted = [layout[PARTS.index(part)] for part in parts]
    fused = [name for name in wanted if "[" in name]
    if fused:
        letters = ",".join(name[-2] for name in fused)
        yield f"{fused[0].partition('[')[0]}[{letters}]"
    apart = [name for name in wanted if "[" not in name]
    if apart:
        yield apart[0] if len(apart) == 1 else f"{{{','.join(apart)}}}"


def _span(layers: Layers, n: int) -> tuple[int, int]:
    """First and one past the last of n layers."""
    spans = {
        "all": (0, n),
        "bottom": (0, n // 3),
        "mid": (n // 3, 2 * n // 3),
        "up": (2 * n // 3, n),
        "half-bottom": (0, n // 2),
        "half-up": (n // 2, n),
        "top3": (max(0, n - 3), n),
    }
    return spans[layers]
