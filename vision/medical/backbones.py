"""The Segment Anything models that a configuration can name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...core import backbone as core
from ...core.building import made, seeded
from ...core.errors import AdaptError
from .sam import SegmentAnything
from .sam_sizes import resize
from .transformers_sam import drawn, from_official, parts_of
from .view import View

_OFFLINE = "(without a network: a folder, SAMCheckpoint or LiteMedSAM, `offline`)"


@dataclass(frozen=True, kw_only=True)
class Backbone(core.Backbone):
    """A Segment Anything model on the CPU in eval mode, as `SegmentAnything`.

    >>> Backbone.from_json(LiteMedSAM(img_size=128).to_json())
    LiteMedSAM(img_size=128)
    """

    places: ClassVar[Mapping[str, str]]
    """Name -> pattern of the layers that are usually adapted; `neck` are convolutions."""

    @abstractmethod
    def build(self) -> SegmentAnything: ...

    def view(self, sam: SegmentAnything) -> View:
        """What the built model was trained to see, at its size."""
        return View.sam(sam.img_size)

    def sites(self, names: Sequence[str] = ("attention", "mlp")) -> list[str]:
        """Patterns for `attach`: by default the linear layers that SALT (arXiv 2503.16055) adapts.

        >>> LiteMedSAM().sites(["neck"])
        ['vision_encoder.neck.{conv1,conv2}']
        """
        for name in names:
            if name not in self.places:
                raise AdaptError(f"{name!r} is no place in a SAM: {', '.join(self.places)} are")
        return [self.places[name] for name in names]


_NECK = {"neck": "vision_encoder.neck.{conv1,conv2}"}
_VIT_PLACES = {
    "attention": "vision_encoder.layers.*.attn.{qkv,proj}",
    "mlp": "vision_encoder.layers.*.mlp.{lin1,lin2}",
    **_NECK,
}


@dataclass(frozen=True, kw_only=True)
class TransformersSAM(Backbone):
    """transformers' SamModel by its name on the hub or its folder, in float32.

    `img_size` is any multiple of the patch: tables are resampled, see `resize`; None leaves 1024.
    With `pretrained=False`, `options` (of SamVisionConfig) and `decoder` (of SamMaskDecoderConfig)
    describe a network whose numbers are drawn from `seed`; `name` is not used.

    Raises `AdaptError` for what cannot be fetched, a model of another kind, and other options.

    >>> tiny = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> more = {"image_size": 64, "output_channels": 16, "global_attn_indexes": [1]}
    >>> sam = TransformersSAM(
    ...     pretrained=False, img_size=32, options=tiny | more, decoder={"mlp_dim": 8}
    ... ).build()
    >>> sam(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 1, 32, 32])
    """

    name: str = "facebook/sam-vit-base"
    pretrained: bool = True
    img_size: int | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=dict)

    places: ClassVar[Mapping[str, str]] = _VIT_PLACES

    def build(self) -> SegmentAnything:
        if self.pretrained:
            sam = self._fetched()
        else:
            with seeded(self.seed), made(f"a SAM with {self.options} and {self.decoder}"):
                sam = drawn(self.options, self.decoder)
        return sam if self.img_size is None else resize(sam, self.img_size)

    def _fetched(self) -> SegmentAnything:
        if self.options or self.decoder:
            raise AdaptError(f"{self.name!r} brings its own settings: leave out options, decoder")
        with made(f"transformers' {self.name!r} {_OFFLINE}"):
            from transformers import AutoConfig, SamModel

            kind = AutoConfig.from_pretrained(self.name).model_type
            if kind != "sam":  # transformers would draw what the file lacks at random
                raise AdaptError(f"{self.name!r} is a model of the kind {kind!r}, not 'sam'")
            return parts_of(SamModel.from_pretrained(self.name, dtype=torch.float32))


@dataclass(frozen=True, kw_only=True)
class TransformersSAM2(Backbone):
    """transformers' Sam2Model (SAM 2, arXiv 2408.00714) by its name or folder, for pictures alone.

    `img_size` is any multiple of 32; None leaves 1024. With `pretrained=False`, `options` (of
    Sam2HieraDetConfig) and `decoder` (of Sam2MaskDecoderConfig) describe a network whose numbers
    are drawn from `seed`. SAM 2's own preprocessing stretches pictures to a square; here they keep
    their aspect, as all others do (our choice).

    Raises `AdaptError` for what cannot be fetched, a model of another kind, and other options.

    >>> hiera = {"hidden_size": 8, "embed_dim_per_stage": [8, 16, 24, 32], "image_size": 64}
    >>> sam = TransformersSAM2(
    ...     pretrained=False, options=hiera, decoder={"hidden_size": 16, "mlp_dim": 8}
    ... ).build()
    >>> sam(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 1, 64, 64])
    """

    name: str = "facebook/sam2.1-hiera-tiny"
    pretrained: bool = True
    img_size: int | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=dict)

    places: ClassVar[Mapping[str, str]] = {
        "attention": "vision_encoder.backbone.blocks.*.attn.{qkv,proj}",
        "mlp": "vision_encoder.backbone.blocks.*.mlp.{proj_in,proj_out}",
        "neck": "vision_encoder.neck.convs.*",
    }

    def build(self) -> SegmentAnything:
        from .sam2 import drawn2, fetched2, resize2

        if self.pretrained and (self.options or self.decoder):
            raise AdaptError(f"{self.name!r} brings its own settings: leave out options, decoder")
        if self.pretrained:
            with made(f"transformers' {self.name!r} {_OFFLINE}"):
                sam = fetched2(self.name)
        else:
            with seeded(self.seed), made(f"a SAM 2 with {self.options} and {self.decoder}"):
                sam = drawn2(self.options, self.decoder)
        return sam if self.img_size is None else resize2(sam, self.img_size)


@dataclass(frozen=True, kw_only=True)
class SAMCheckpoint(Backbone):
    """A file under the names of SAM's authors: sam_vit_b_01ec64.pth, medsam_vit_b.pth and the like.

    Width, depth, heads, windows and size of the encoder are read off the tensors; the decoder has
    SAM's eight heads. `medsam` says that the file is one of MedSAM's (arXiv 2304.12306), which were
    trained on stretched pictures.

    Raises `AdaptError` for a file that cannot be read, or holds something else.
    """

    file: str
    img_size: int | None = None
    medsam: bool = False

    places: ClassVar[Mapping[str, str]] = _VIT_PLACES

    def view(self, sam: SegmentAnything) -> View:
        return View.medsam(sam.img_size) if self.medsam else super().view(sam)

    def build(self) -> SegmentAnything:
        with made(f"the checkpoint {self.file!r}"):
            state = torch.load(Path(self.file), map_location="cpu", weights_only=True)
            sam = from_official(state)
        return sam if self.img_size is None else resize(sam, self.img_size)


@dataclass(frozen=True, kw_only=True)
class LiteMedSAM(Backbone):
    """The LiteMedSAM that a package index brings; `img_size` is a multiple of 4, 256 its own.

    It was trained with boxes around what is to be found; other prompts need training.
    """

    img_size: int = 256

    places: ClassVar[Mapping[str, str]] = {
        "attention": "vision_encoder.stages.*.blocks.*.attn.{qkv,proj}",
        "mlp": "vision_encoder.stages.*.blocks.*.mlp.{fc1,fc2}",
        **_NECK,
    }

    def build(self) -> SegmentAnything:
        from .lite_medsam import lite_medsam

        return lite_medsam(self.img_size)

    def view(self, sam: SegmentAnything) -> View:
        return View.medsam(sam.img_size)
