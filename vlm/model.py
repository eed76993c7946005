"""One thin interface over image-text models: open_clip's classes and those of transformers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import AdaptError
from ..core.images.preprocessing import Preprocessing
from .short_texts import causal_features, ends_before, is_causal, last_of

Tokenizer = Callable[..., Any]
"""open_clip's: called with texts and `context_length`; or one of transformers."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CLIP_VOCABULARY = 49408
_OPEN_CLIP = ("CLIP", "CustomTextCLIP", "CoCa")
_TRANSFORMERS = ("CLIPModel", "SiglipModel")


class ImageText(ABC):
    """An image tower and a text tower that meet in one space of `width` dimensions.

    Adapters are attached to `model`, and act in all methods. `image_text_of(model)` makes one.
    """

    eye: ClassVar[str]
    """The path of the image tower."""

    shortens = False
    """Whether `shorter` may take columns away."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None,
        preprocessing: Preprocessing,
        *,
        context: int,
        width: int,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.context = context
        self.width = width

    @property
    def scale(self) -> float:
        """exp(logit_scale) of the checkpoint: the inverse temperature that it was trained to."""
        return math.exp(self.model.logit_scale.item())  # type: ignore[operator]

    @property
    def bias(self) -> float | None:
        """What SigLIP (arXiv 2303.15343) adds to the scaled cosine; None for the others."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias.item())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> int64 [t, context], on the CPU.

        Raises `AdaptError` for a text that the context would cut, which tokenizers do silently.
        """
        if isinstance(texts, str) or not texts:
            raise AdaptError(f"texts are a list of at least one, not {texts!r}")
        found, wider = self._tokens(texts, self.context), self._tokens(texts, self.context + 1)
        # A text that fits gets one more of padding, and a cut one its next word in the end's place.
        seen = self.context - (getattr(self.tokenizer, "tokenizer_mode", "") == "clips")
        cut = (found[:, :seen] != wider[:, :seen]).any(1)
        for text in (text for text, short in zip(texts, cut.tolist(), strict=True) if short):
            start = text if len(text) <= 60 else f"{text[:57]}..."
            raise AdaptError(
                f"the text {start!r} is longer than the {self.context} tokens that the model reads"
            )
        return found

    def _tokens(self, texts: Sequence[str], length: int) -> Tensor:
        if self.tokenizer is None:
            raise AdaptError(
                f"this {type(self.model).__name__} came without a tokenizer: pass tokenizer="
            )
        if hasattr(self.tokenizer, "convert_tokens_to_ids"):  # one of transformers
            options = {"padding": "max_length", "truncation": True, "max_length": length}
            return torch.tensor(self.tokenizer(list(texts), **options)["input_ids"])
        tokens: Tensor = self.tokenizer(list(texts), context_length=length)
        return tokens

    def shorter(self, tokens: Tensor) -> Tensor:
        """Tokens [t, context] -> [t, n], n <= context: without columns that no feature depends on.

        Those behind the longest text, where the tower is causal or masks the padding; else all are
        kept. Features are those of all columns up to the rounding of products of other sizes.
        """
        return tokens

    def image_features(self, images: Tensor) -> Tensor:
        """Images [b, 3, h, w], as `preprocessing` makes them -> float32 [b, d] of length 1."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise AdaptError(f"images are [b, 3, height, width], not {list(images.shape)}")
        tower = self.model.get_submodule(self.eye)
        # Of a layer, not of the first parameter: half-precision models keep embeddings in float32.
        layer = next(m for m in tower.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        weight = next(layer.parameters(recurse=False))  # as stored, whatever adapts it
        return F.normalize(self._image(images.to(weight)).float(), dim=-1)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Tokens [t, context], or what `shorter` made of them -> float32 [t, d] of length 1."""
        fewest = 1 if self.shortens else self.context
        if tokens.ndim != 2 or not fewest <= tokens.shape[1] <= self.context:
            raise AdaptError(f"tokens are [t, {self.context}], not {list(tokens.shape)}")
        return F.normalize(self._text(tokens.to(self.device)).float(), dim=-1)

    @abstractmethod
    def _image(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def _text(self, tokens: Tensor) -> Tensor: ...


class OpenCLIPImageText(ImageText):
    """open_clip's CLIP, CustomTextCLIP or CoCa."""

    eye = "visual"

    def __init__(
        self, model: Any, tokenizer: Tokenizer | None, preprocessing: Preprocessing | None
    ) -> None:
        text = getattr(model, "text", model)
        tokenizer = _clip_tokenizer(text) if tokenizer is None else tokenizer
        super().__init__(
            model,
            tokenizer,
            preprocessing or _open_clip_preprocessing(model.visual),
            context=_context(text, tokenizer),
            width=_text_width(text),
        )
        self.text = text
        self.masks = hasattr(text, "config")  # Hugging Face's towers, in open_clip, the padding
        self.shortens = self.masks or is_causal(text)

    def shorter(self, tokens: Tensor) -> Tensor:
        if self.masks:
            return ends_before(tokens, last_of(tokens, self.text.config.pad_token_id))
        return ends_before(tokens, tokens.argmax(-1)) if self.shortens else tokens

    def _image(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(images, normalize=False)  # type: ignore[operator]
        return features

    def _text(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] < self.context and not self.masks:
            return causal_features(self.text, tokens)
        features: Tensor = self.model.encode_text(tokens, normalize=False)  # type: ignore[operator]
        return features


class TransformersImageText(ImageText):
    """transformers' CLIPModel or SiglipModel."""

    eye = "vision_model"

    def __init__(
        self, model: Any, tokenizer: Tokenizer | None, preprocessing: Preprocessing | None
    ) -> None:
        seen, read = model.config.vision_config, model.config.text_config
        siglip = hasattr(model, "logit_bias")
        super().__init__(
            model,
            tokenizer,
            preprocessing or _transformers_preprocessing(seen.image_size, siglip),
            context=read.max_position_embeddings,
            width=read.projection_size if siglip else model.config.projection_dim,
        )
        self.end = read.eos_token_id
        self.shortens = not siglip  # which was trained to read the padding

    def shorter(self, tokens: Tensor) -> Tensor:
        if not self.shortens:
            return tokens
        # Older checkpoints name a wrong end, and the largest token is taken for it.
        ends = tokens if self.end == 2 else (tokens == self.end).int()
        return ends_before(tokens, ends.argmax(-1))

    def _image(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.get_image_features(pixel_values=images).pooler_output  # type: ignore[operator]
        return features

    def _text(self, tokens: Tensor) -> Tensor:
        # No mask of the padding: CLIP is causal and SigLIP was trained without one.
        features: Tensor = self.model.get_text_features(input_ids=tokens).pooler_output  # type: ignore[operator]
        return features


def image_text_of(
    model: nn.Module,
    tokenizer: Tokenizer | None = None,
    preprocessing: Preprocessing | None = None,
) -> ImageText:
    """The interface for a model of any of these classes, as `attach` also gets it.

    `tokenizer`: open_clip's or one of transformers; a model with CLIP's own vocabulary needs none
    to be given. `preprocessing`: what the model says of itself unless given.

    >>> from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg
    >>> eye = CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=8, image_size=16)
    >>> clip = image_text_of(CLIP(8, eye, CLIPTextCfg(width=16, heads=2, layers=1)))
    >>> clip.image_features(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 8])
    >>> clip.text_features(clip.tokenize(["a photo of a cat."])).shape
    torch.Size([1, 8])
    """
    # Known by name: open_clip and transformers take seconds to import, and this needs neither.
    for cls in type(model).__mro__:
        maker = cls.__module__.split(".")[0]
        if maker == "open_clip" and cls.__name__ in _OPEN_CLIP:
            return OpenCLIPImageText(model, tokenizer, preprocessing)
        if maker == "transformers" and cls.__name__ in _TRANSFORMERS:
            return TransformersImageText(model, tokenizer, preprocessing)
    raise AdaptError(
        f"{type(model).__name__} is no image-text model that we know: open_clip's"
        f" {', '.join(_OPEN_CLIP)} and transformers' {', '.join(_TRANSFORMERS)} are"
    )


def _clip_tokenizer(text: Any) -> Tokenizer | None:
    """CLIP's own, for a tower that has its vocabulary."""
    if hasattr(text, "config") or text.vocab_size != _CLIP_VOCABULARY:
        return None
    from open_clip import SimpleTokenizer

    tokenizer: Tokenizer = SimpleTokenizer()
    return tokenizer


def _context(text: Any, tokenizer: Tokenizer | None) -> int:
    """What the tower reads; of a Hugging Face tower, what its tokenizer says if less."""
    most = int(text.context_length)
    said = getattr(tokenizer, "context_length", None)
    return min(most, said) if hasattr(text, "config") and said else most


def _text_width(text: Any) -> int:
    """d, asked of the text tower: image towers of timm do not say it."""
    projection = getattr(text, "text_projection", None)
    if isinstance(projection, nn.Linear):
        return projection.out_features
    if isinstance(projection, Tensor):
        return projection.shape[1]
    return int(text.ln_final.weight.shape[0] if hasattr(text, "ln_final") else text.output_dim)


def _open_clip_preprocessing(visual: Any) -> Preprocessing:
    """What the checkpoint was trained with as open_clip notes it.

    A bare tower gets what timm says of it, or CLIP's.
    """
    said: Mapping[str, Any] = getattr(visual, "preprocess_cfg", None) or {}
    if not said and hasattr(visual, "trunk"):
        return Preprocessing.of(visual.trunk)
    how = said.get("resize_mode", "shortest")
    if how not in ("shortest", "squash"):
        raise AdaptError(f"images resized by their {how} side are unknown here: give preprocessing")
    return Preprocessing(
        size=_pair(said.get("size", visual.image_size)),
        mean=tuple(said.get("mean", CLIP_MEAN)),
        std=tuple(said.get("std", CLIP_STD)),
        interpolation=said.get("interpolation", "bicubic"),
        crop_mode="center" if how == "shortest" else "squash",
    )


def _transformers_preprocessing(size: int, siglip: bool) -> Preprocessing:
    """What the two families were trained with."""
    if siglip:
        half = (0.5, 0.5, 0.5)
        return Preprocessing(size=_pair(size), mean=half, std=half, crop_mode="squash")
    return Preprocessing(size=_pair(size), mean=CLIP_MEAN, std=CLIP_STD)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
