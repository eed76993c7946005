"""The image-text models that a configuration can name."""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core import backbone as core
from ..core.building import made, refuse_code, seeded
from ..core.errors import AdaptError
from ..core.images.preprocessing import Preprocessing
from .model import ImageText, Tokenizer, image_text_of
from .split import split_attention

_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
_OWN_WEIGHTS = ("hf-hub:", "local-dir:")  # names that bring weights and settings with them


@dataclass(frozen=True, kw_only=True)
class Backbone(core.Backbone):
    """An image-text model on the CPU in eval mode; `image_text` gives its interface.

    >>> Backbone.from_json(OpenCLIP(name="ViT-B-16-quickgelu", pretrained="openai").to_json()).name
    'ViT-B-16-quickgelu'
    """

    @abstractmethod
    def image_text(self, model: nn.Module) -> ImageText:
        """The interface of what `build` made, with its tokenizer and preprocessing."""


@dataclass(frozen=True, kw_only=True)
class OpenCLIP(Backbone):
    """One of open_clip's models by its name and the tag or file of its weights.

    A name `hf-hub:...` or `local-dir:...` brings its own weights; for the others `pretrained=None`
    draws random ones from `seed`, so that they, too, can be built again. `split`: q, k and v of its
    own towers become layers that are called, see `split_attention`; adapters with dropout need
    that. `options` go to `open_clip.create_model` (force_image_size, vision_cfg, ...).

    Raises `AdaptError` for an unknown name or tag (with those that there are), for weights that do
    not exist or cannot be fetched, and for those of another activation than the name's: OpenAI's
    were trained with QuickGELU, and answer worse without an error in ViT-B-16 than in
    ViT-B-16-quickgelu.

    >>> model = OpenCLIP(name="ViT-S-32-alt", pretrained=None).build()
    >>> model.visual.transformer.resblocks[0].attn.q_proj.weight.shape
    torch.Size([384, 384])
    """

    name: str
    pretrained: str | None
    split: bool = True
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        self._check()
        weights = self.pretrained is not None or self.name.startswith(_OWN_WEIGHTS)
        bare = {} if weights else {"pretrained_image": False, "pretrained_text": False}
        with seeded(self.seed), made(self._what(weights)):
            import open_clip

            model: nn.Module = open_clip.create_model(
                self.name,
                pretrained=self.pretrained,
                require_pretrained=weights,
                **{**bare, **self.options},
            )
        if self.split:
            split_attention(model)
        return model.eval()

    def image_text(self, model: nn.Module) -> ImageText:
        return image_text_of(model, self._tokenizer())

    def _tokenizer(self) -> Tokenizer | None:
        """A model's own; None stands for CLIP's, if the model has its vocabulary."""
        import open_clip

        with made(f"the tokenizer of {self.name!r}"):
            config = open_clip.get_model_config(self.name) or {}
            text = config.get("text_cfg", {})
            if not text.get("hf_tokenizer_name") and not text.get("tokenizer_kwargs"):
                return None
            tokenizer: Tokenizer = open_clip.get_tokenizer(self.name)
            return tokenizer

    def _what(self, weights: bool) -> str:
        of = f" with the weights {self.pretrained!r}" if self.pretrained else ""
        settings = f" with {self.options}" if self.options else ""
        hint = " (without a network: a file, or OfflinePair, `offline`)" if weights else ""
        return f"open_clip's {self.name!r}{of}{settings}{hint}"

    def _check(self) -> None:
        """An unknown name or tag is refused before anything is made."""
        refuse_code(self.options)
        import open_clip

        if self.name.startswith(_OWN_WEIGHTS):
            if self.pretrained is not None:
                raise AdaptError(
                    f"{self.name!r} brings its own weights: leave out {self.pretrained!r}"
                )
            return
        names = open_clip.list_models()
        if self.name not in names:
            near = ", ".join(difflib.get_close_matches(self.name, names, n=3, cutoff=0.4))
            raise AdaptError(
                f"open_clip has no model {self.name!r}; nearest: {near or 'none'};"
                " open_clip.list_models() names all; those of transformers are TransformersCLIP,"
                " hf:NAME in a command"
            )
        if self.pretrained is not None and not Path(self.pretrained).is_file():
            tags = open_clip.list_pretrained_tags_by_model(self.name)
            tag = open_clip.get_pretrained_cfg(self.name, self.pretrained)
            if not tag:
                raise AdaptError(
                    f"open_clip has no weights {self.pretrained!r} for {self.name!r}, and there is"
                    f" no such file; it has {', '.join(tags) or 'none'}"
                )
            self._check_activation(tag, open_clip.get_model_config(self.name))

    def _check_activation(self, tag: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Refused where another name has the weights' activation; else open_clip itself warns."""
        import open_clip

        quick = self.options.get("force_quick_gelu") or config.get("quick_gelu", False)
        if bool(self.options.get("quick_gelu", quick)) == bool(tag.get("quick_gelu", False)):
            return
        plain = self.name.removesuffix("-quickgelu")
        other = f"{plain}-quickgelu" if plain == self.name else plain
        if open_clip.get_pretrained_cfg(other, self.pretrained):
            raise AdaptError(
                f"the weights {self.pretrained!r} were trained with another activation than"
                f" {self.name!r} has: name {other!r}"
            )


@dataclass(frozen=True, kw_only=True)
class TransformersCLIP(Backbone):
    """transformers' CLIP or SigLIP by its name on the hub or its folder, in float32.

    Raises `AdaptError` for what cannot be fetched, and for a model of another kind.
    """

    name: str

    def build(self) -> nn.Module:
        with made(self._what("")):
            from transformers import AutoModel

            model: nn.Module = AutoModel.from_pretrained(self.name, dtype=torch.float32)
        image_text_of(model)  # refuses another kind
        return model.eval()

    def image_text(self, model: nn.Module) -> ImageText:
        with made(self._what("the tokenizer and image processor of ")):
            from transformers import AutoImageProcessor, AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.name)
            processor = AutoImageProcessor.from_pretrained(self.name)
        return image_text_of(model, tokenizer, _preprocessing(processor))

    def _what(self, part: str) -> str:
        hint = "(without a network: a folder, or OfflinePair, `offline`)"
        return f"{part}transformers' {self.name!r} {hint}"


@dataclass(frozen=True, kw_only=True)
class OfflinePair(Backbone):
    """The DINOv2 and MiniLM that a package index brings, joined; `img_size` is a multiple of 14."""

    img_size: int = 98

    def build(self) -> nn.Module:
        from .offline import offline_pair

        model: nn.Module = offline_pair(self.img_size)
        return model

    def image_text(self, model: nn.Module) -> ImageText:
        from .offline import pair_tokenizer

        return image_text_of(model, pair_tokenizer())


def _preprocessing(processor: Any) -> Preprocessing:
    """What an image processor of transformers does."""
    cuts = bool(getattr(processor, "do_center_crop", False))
    size = processor.crop_size if cuts else processor.size
    shortest = processor.size["shortest_edge"] if cuts else None
    return Preprocessing(
        size=(size["height"], size["width"]),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        interpolation=_FILTERS[int(processor.resample)],
        crop_pct=size["height"] / shortest if shortest else 1.0,
        crop_mode="center" if cuts else "squash",
    )
