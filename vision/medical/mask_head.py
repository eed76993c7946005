"""What a task trains beside the adapters: a token per class, and copies of parts of the SAM."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...core.building import seeded
from ...core.errors import AdaptError
from ...core.sets import sets_of
from .sam import Prompt, SegmentAnything

_DECODER = r"mask_decoder\."
PARTS = {
    "tokens": _DECODER + r"(iou_token|mask_tokens)\..*",
    "norms": _DECODER + r"transformer\..*layer_norm.*",
    "transformer": _DECODER + r"transformer\..*",
    "upscaling": _DECODER + r"upscale_.*",
    "hypernetwork": _DECODER + r"output_hypernetworks_mlps\.0\..*",
    "encoder_norms": r"vision_encoder\.(layers|stages|backbone\.blocks)\..*norm\d?\.(weight|bias)",
    "positions": r"vision_encoder\.(backbone\.)?pos_embed(_window)?",
}
"""Name -> the parameters (a regular expression over names in `SegmentAnything`) of a part.

With one mask as output, the other masks' networks and the estimate of the overlap do nothing, and
are in no part. `norms`, `encoder_norms` and `positions` are what SALT's code (arXiv 2503.16055)
trains beside its adapters.
"""
DECODER = ("tokens", "transformer", "upscaling", "hypernetwork")
"""All of the decoder that acts on the one mask."""


class ClassToken(nn.Module):
    """One learned prompt token per class, [m, 1, d].

    It starts as SAM's mark of a point on the object, without a place (our choice).
    """

    def __init__(self, sam: SegmentAnything, classes: int = 1) -> None:
        super().__init__()
        start = sam.mark.detach().float()
        self.token = nn.Parameter(start.repeat(classes, 1)[:, None])

    def forward(self) -> Tensor:
        return self.token


class TextToken(nn.Module):
    """norm(relu(W f + b)) of frozen text features f [m, t]: one prompt token per class, [m, 1, d].

    The norm is a LayerNorm: the BatchNorm of SALT's and S-SAM's code returns its bias alone when
    all samples of a batch have the same text. W is drawn from the run's seed. The features travel
    with the head, so that no text tower is needed to segment.
    """

    features: Tensor

    def __init__(self, sam: SegmentAnything, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features.detach().float())
        with seeded(torch.initial_seed()):
            self.affine = nn.Linear(features.shape[1], sam.width, dtype=torch.float32)
        self.norm = nn.LayerNorm(sam.width, dtype=torch.float32)

    def forward(self) -> Tensor:
        token: Tensor = self.norm(self.affine(self.features).relu())
        return token[:, None]


class MaskHead(nn.Module):
    """The tensors of a task on a frozen SAM: `head(sam, images)` -> logits [b, m, s, s].

    `parts` name what of the SAM is trained (see `PARTS`): their copies act in the head's calls
    only, so that one frozen SAM serves many tasks. `prompt` gives the classes' tokens; without one,
    a call needs boxes or points, or SAM guesses. Tokens come on top of other prompts, which are
    then for as many masks; the token of one class goes with any number of them. `whole_box` puts a
    box around the whole square where a call has none: a start for SAMs that were trained with boxes
    alone, such as LiteMedSAM (our choice).

    The head does not own the SAM. Raises `AdaptError` for an unknown part, one that this SAM lacks,
    and one with a tensor that an attached adapter set adapts.
    """

    def __init__(
        self,
        sam: SegmentAnything,
        *,
        parts: Sequence[str] = DECODER,
        prompt: ClassToken | TextToken | None = None,
        whole_box: bool = False,
    ) -> None:
        super().__init__()
        self.whole_box = whole_box
        self.prompt = prompt
        found = dict.fromkeys(name for part in parts for name in part_names(sam, part))
        _require_free(sam, found)
        own = dict(sam.named_parameters())
        # ParameterDict allows no dots in names.
        copies = {n.replace(".", "/"): own[n].detach().float().clone() for n in found}
        self.copies = nn.ParameterDict({n: nn.Parameter(c) for n, c in copies.items()})

    def forward(
        self,
        sam: SegmentAnything,
        images: Tensor,
        prompt: Prompt | None = None,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """Logits [b, m, s, s]; see `SegmentAnything.forward`.

        Known embeddings are of the SAM itself: refused where the head has parts of its encoder.
        """
        if embeddings is not None and any(n.startswith("vision_encoder/") for n in self.copies):
            raise AdaptError("this head trains parts of the encoder: known embeddings lack them")
        prompt = self._completed(prompt or Prompt(), images)
        named = {name.replace("/", "."): copy for name, copy in self.copies.items()}
        own = {name: copy.to(sam.get_parameter(name).dtype) for name, copy in named.items()}
        logits: Tensor = functional_call(sam, own, (images, prompt, embeddings), tie_weights=False)
        return logits

    def _completed(self, prompt: Prompt, images: Tensor) -> Prompt:
        """The prompt where the images are, with the head's own tokens and box."""
        prompt = prompt.to(images.device)
        tokens = None if self.prompt is None else self.prompt()
        if tokens is not None:
            places = prompt.points if prompt.boxes is None else prompt.boxes
            if len(tokens) == 1 and places is not None:
                tokens = tokens.expand(places.shape[1], -1, -1)
            prompt = dataclasses.replace(prompt, tokens=tokens)
        if self.whole_box and prompt.boxes is None:
            corners = images.new_tensor([0, 0, images.shape[-1] - 1, images.shape[-2] - 1])
            masks = 1 if tokens is None else len(tokens)
            prompt = dataclasses.replace(prompt, boxes=corners.expand(len(images), masks, 4))
        return prompt


def _require_free(sam: SegmentAnything, names: Iterable[str]) -> None:
    """Copies would hide the adapted tensor, or be hidden by it."""
    taken = {
        f"{site.path}.{site.parameter}": name
        for name, adapters in sets_of(sam).items()
        for site in adapters.sites
    }
    for name in names:
        if name in taken:
            raise AdaptError(
                f"{name} is adapted by the set {taken[name]!r}: leave it out of the set's sites, or"
                " its part out of the head"
            )


def part_names(sam: SegmentAnything, part: str) -> list[str]:
    """The names of a part's parameters in `sam.named_parameters()`."""
    if part not in PARTS:
        raise AdaptError(f"{part!r} is no part of a SAM: {', '.join(PARTS)} are")
    names = [name for name, _ in sam.named_parameters() if re.fullmatch(PARTS[part], name)]
    if not names:
        raise AdaptError(f"this SAM, of a {type(sam.vision_encoder).__name__}, has no {part!r}")
    return names
