"""Segmentation of medical pictures: a frozen SAM, one adapter set, and the head's own tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from torch import Tensor

from ...core.adapters.head_only import HeadOnly
from ...core.errors import AdaptError, require_word
from ...core.recipe import Recipe
from ...core.store import load
from ...core.training import AdaptedModule
from ..frozen_prefix import Keep, folder_of
from .backbones import Backbone
from .data import Batch, SegmentationData
from .describe import Description, Token, describe, trained_on
from .frozen_prefix import KeptPrefix, require_fixed_pictures, require_keepable
from .inference import in_windows
from .losses import DiceCE, Loss
from .mask_head import DECODER, ClassToken, MaskHead, TextToken
from .measured import Scored
from .metrics import MaskScores, means, score
from .sam import Prompt, SegmentAnything
from .text_prompt import ClipText
from .view import View

Scores = Literal["dice", "all"]


class Segmentation(AdaptedModule):
    """Trains adapters of a SAM's encoder and a head: pictures -> logits [b, 1, s, s].

    `at` are patterns or names of the backbone's places ("attention", "mlp", "neck"); without it the
    attention, or a method's own sites (BitFit's biases, ...) as far as they are in the encoder. The
    head (`MaskHead`) trains copies of the `parts` of the SAM and a prompt: `class` is a learned
    token, `text` the word `structure` through a frozen CLIP (settings: a `ClipText`) and a trained
    affine map, `none` neither; `whole_box` adds a box around the whole square, which suits SAMs
    that were trained with boxes (LiteMedSAM).

    `loss` is `DiceCE()` unless given, taken at s x s, padding included. With `fractions` its masks
    are the marked share of each pixel, else 0 or 1: on thin structures a model that knows shares
    can reach more at the picture's own size (`metrics.ceiling`). `view` is the backbone's own
    unless given. Validation and test report the loss and, at the pictures' own size, the means over
    pictures of Dice, IoU, clDice and HD95 with the empty-mask rule and its counts (`metrics`);
    what was trained on crops is scored through windows of their size (`in_windows`), its loss there
    is of whole pictures;
    `val_scores="dice"` leaves the slow two out of the validation. The other settings are
    `AdaptedModule`'s. View, backbone, prompt and loss travel in the adapter file.

    `cache_prefix` computes what enters the encoder's first adapted block, or with none adapted the
    embeddings, once per picture before training, and keeps up to `cache_bytes` of it in memory or
    on disk (in the run's folder, unnamed: gone with the run). Results are the same up to rounding.
    Pictures must not vary, and the head must train no part of the encoder.

    Raises `AdaptError` for what does not fit together, by name.

    >>> from polyadapt.core import LoRA
    >>> from polyadapt.vision.medical.backbones import TransformersSAM
    >>> tiny = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> more = {"image_size": 32, "output_channels": 16, "global_attn_indexes": [1]}
    >>> sam = TransformersSAM(pretrained=False, options=tiny | more, decoder={"mlp_dim": 8})
    >>> task = Segmentation(sam, LoRA(rank=2))
    >>> import torch
    >>> task(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 1, 32, 32])
    """

    backbone: SegmentAnything
    head: MaskHead

    def __init__(
        self,
        backbone: Backbone,
        adapter: Recipe,
        at: str | list[str] | None = None,
        *,
        parts: list[str] | None = None,
        prompt: Token | ClipText = "class",
        whole_box: bool = False,
        loss: Loss | None = None,
        fractions: bool = True,
        view: View | None = None,
        structure: str = "vessel",
        val_scores: Scores = "dice",
        cache_prefix: Keep = "none",
        cache_bytes: int = 2 << 30,
        **training: Any,
    ) -> None:
        token = "text" if isinstance(prompt, ClipText) else prompt
        require_word("prompt", token, Token)
        require_word("val_scores", val_scores, Scores)
        if not structure or not structure.isprintable():
            raise AdaptError(f"structure={structure!r} is not allowed: a word, such as vessel")
        require_word("cache_prefix", cache_prefix, Keep)
        sam = backbone.build()
        own = view or backbone.view(sam)
        if own.side != sam.img_size:
            raise AdaptError(f"view.side={own.side} is not the backbone's img_size={sam.img_size}")
        super().__init__(sam, adapter, sites_for(backbone, adapter, sam, at), **training)
        # Of a method's own sites some may be idle, see `AdaptedModule`.
        self._chosen = at is not None or _needs_sites(adapter)
        parts = [*DECODER] if parts is None else parts
        self.head = MaskHead(
            sam, parts=parts, prompt=_made_prompt(sam, prompt, structure), whole_box=whole_box
        )
        if cache_prefix != "none":  # refuses what it cannot keep
            require_keepable(sam, parts)
        self.cache_prefix: Keep = cache_prefix
        self.cache_bytes = cache_bytes
        self._kept: KeptPrefix | None = None
        self.spec, self.view, self.loss = backbone, own, loss or DiceCE()
        self.fractions, self.val_scores = fractions, val_scores
        self.adapters.extra = Description(
            backbone=backbone,
            view=own,
            parts=tuple(parts),
            token=token,
            whole_box=whole_box,
            structure=structure,
            loss=self.loss,
            fractions=fractions,
            head={},
        ).extra()
        self._scored: list[MaskScores] = []
        self._unit: str | None = None

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The task of an adapter file, to be validated and tested; the file says everything."""
        about = describe(path)
        task = cls(
            about.backbone,
            HeadOnly(),
            parts=[],
            prompt="none",
            whole_box=about.whole_box,
            loss=about.loss,
            fractions=about.fractions,
            view=about.view,
            structure=about.structure,
        )
        task.adapters.detach()
        load(task.backbone, path, task.set_name)
        task.head = about.made_head(task.backbone)
        return task

    def setup(self, stage: str) -> None:
        """Tell the data what the backbone wants to see."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, SegmentationData):
            raise AdaptError(
                f"a segmentation needs pictures with masks, not a {type(data).__name__}: "
                f"{', '.join(kind.__name__ for kind in SegmentationData.__subclasses__())}"
            )
        data.view, data.fractions = self.view, self.fractions
        if stage == "fit":
            self.adapters.extra |= trained_on(data.crop, data.window)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.cache_prefix == "none":
            return
        data = require_fixed_pictures(self.trainer.datamodule, self.trainer)  # type: ignore[attr-defined]
        folder = folder_of(self.trainer) if self.cache_prefix == "disk" else None
        self._kept = KeptPrefix(self.backbone, data, max_bytes=self.cache_bytes, folder=folder)
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._kept.fill(data, self.trainer)

    def teardown(self, stage: str) -> None:
        self._kept = None

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone, images)
        return logits

    def logits(self, batch: Batch, part: str = "train") -> Tensor:
        """[b, 1, s, s] of a batch of the part train, val or test, in fp32."""
        known = None if self._kept is None else self._kept(batch, part)
        found: Tensor = self.head(self.backbone, batch.image, embeddings=known)
        return found.float()

    def training_loss(self, batch: Batch) -> Tensor:
        return self.loss(self.logits(batch), batch.mask)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure("val", batch, overlap_only=self.val_scores == "dice")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, list[Scored]]:
        return {"scored": self._measure("test", batch)}

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def _measure(self, part: str, batch: Batch, overlap_only: bool = False) -> list[Scored]:
        """Log a batch's loss and score its pictures at their own size."""
        logits = self.logits(batch, part)
        loss = self.loss(logits, batch.mask)
        self.log(f"{part}_loss", loss, batch_size=len(logits), sync_dist=True)
        found = [
            self._scored_case(part, int(number), maps, overlap_only)
            for number, maps in zip(batch.number, logits, strict=True)
        ]
        self._scored += [one.scores for one in found]
        return found

    def _scored_case(self, part: str, number: int, maps: Tensor, overlap_only: bool) -> Scored:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        case = data.cases(part)[number]
        picture, target = case.read()
        if data.crop is None:
            native = self.view.native(maps, (target.shape[0], target.shape[1]))[0]
        else:  # what was trained on crops is asked about crops, as `segment` does
            native = in_windows(self._answered, self.view, picture.pixels, data.crop)
        prediction = (native > 0).cpu().numpy().astype(np.uint8)
        scores = score(prediction, target, picture.spacing, overlap_only=overlap_only)
        found = Scored(case.name, case.patient, picture, target, prediction, scores)
        if self._unit not in (None, found.unit) and not overlap_only:
            raise AdaptError(
                f"{part}: HD95 of {case.name} is in {found.unit}, of those before in {self._unit}:"
                " there is no mean of both; measure files with and without a spacing apart"
            )
        self._unit = found.unit
        return found

    def _answered(self, images: Tensor, prompt: Prompt | None = None) -> Tensor:
        logits: Tensor = self.head(self.backbone, images.to(self.device), prompt)
        return logits

    def _log_means(self, part: str) -> None:
        found, self._scored, self._unit = self._scored, [], None
        if not found:
            return
        for name, value in means(found).items():
            counts = name in ("pictures", "one_empty", "both_empty")
            how = "sum" if counts else "mean"
            self.log(f"{part}_{name}", float(value), reduce_fx=how, sync_dist=True)


def sites_for(
    backbone: Backbone, recipe: Recipe, sam: SegmentAnything, at: str | list[str] | None
) -> list[str] | None:
    """Patterns for `attach`: names of places become the backbone's patterns."""
    if at is None:
        if _needs_sites(recipe):
            return backbone.sites(["attention"])
        own = recipe.default_at(sam)
        # The head has the decoder. None: the method has no sites.
        return [name for name in own if name.startswith("vision_encoder.")] or None
    asked = [at] if isinstance(at, str) else at
    return [backbone.places.get(name, name) for name in asked]


def _needs_sites(recipe: Recipe) -> bool:
    return type(recipe).default_at is Recipe.default_at


def _made_prompt(
    sam: SegmentAnything, prompt: Token | ClipText, structure: str
) -> ClassToken | TextToken | None:
    if prompt == "class":
        return ClassToken(sam)
    if prompt == "none":
        return None
    text = prompt if isinstance(prompt, ClipText) else ClipText()
    return TextToken(sam, text.features([structure]))
