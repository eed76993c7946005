"""The quick track: real LiteMedSAM, generated vessels, one prefix for all steps, every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import (
    SALT,
    SSAM,
    BitFit,
    FullFineTuning,
    HeadOnly,
    LoRA,
    Recipe,
    activate,
    attach,
)
from polyadapt.tests.test_prefix_cache import calls_of
from polyadapt.vision.medical.backbones import LiteMedSAM
from polyadapt.vision.medical.data import Batch, GeneratedVessels
from polyadapt.vision.medical.frozen_prefix import KeptPrefix
from polyadapt.vision.medical.losses import DiceCE
from polyadapt.vision.medical.mask_head import ClassToken, MaskHead
from polyadapt.vision.medical.sam import SegmentAnything
from polyadapt.vision.medical.vessels import Vessels
from polyadapt.vision.medical.view import View

pytestmark = pytest.mark.slow

SIDE, STEPS = 64, 12
LAST = "vision_encoder.stages.3.blocks"
ATTENTION = f"{LAST}.*.attn.{{qkv,proj}}"
# The attention adapted in the last stage alone: a step of two pictures takes 0.2 CPU seconds.
# Learning rates: with the decoder, then of the adapters alone.
METHODS: dict[str, tuple[Recipe, str | None, float, float]] = {
    "SALT": (SALT(top=0.1, rank=16), ATTENTION, 3e-3, 1e-3),
    "S-SAM": (SSAM(), ATTENTION, 3e-3, 1e-3),
    "LoRA": (LoRA(rank=4), ATTENTION, 3e-3, 1e-3),
    "BitFit": (BitFit(), None, 3e-3, 1e-3),
    "full": (FullFineTuning(), f"{LAST}.**", 3e-4, 1e-5),
    "decoder": (HeadOnly(), None, 3e-3, 1e-3),
}


def data() -> GeneratedVessels:
    made = GeneratedVessels(2, 0, 0, SIDE, SIDE, vessels=Vessels(width=0.05, least=0.02))
    made.setup()
    made.view, made.fractions = View.medsam(SIDE), True
    return made


def sites(recipe: Recipe, at: str | None, sam: SegmentAnything) -> Any:
    """For BitFit the biases of the last stage, by name."""
    if not isinstance(recipe, BitFit):
        return at
    return [name for name in recipe.default_at(sam) if name.startswith(LAST)]


class Run:
    """A training of a few steps on both pictures, whose prefix is computed once."""

    def __init__(self, method: str) -> None:
        recipe, at, lr, alone = METHODS[method]
        torch.manual_seed(0)
        self.sam = LiteMedSAM(img_size=SIDE).build()
        self.adapters = attach(self.sam, recipe, at=sites(recipe, at, self.sam))
        self.head = MaskHead(self.sam, prompt=ClassToken(self.sam), whole_box=True)
        given = data()
        self.batch: Batch = next(iter(given.train_dataloader()))
        self.embedded = calls_of(self.sam.get_submodule("vision_encoder.patch_embed"))
        self.kept = KeptPrefix(self.sam, given)
        adapters = list(self.adapters.trained().values())
        self.losses = self.steps([*adapters, *self.head.parameters()], lr, STEPS)
        self.alone = self.steps(adapters, alone, 4) if adapters else []

    def steps(self, trained: list[nn.Parameter], lr: float, count: int) -> list[float]:
        optimizer = torch.optim.AdamW(trained, lr=lr)
        losses = []
        for _ in range(count):
            loss = self.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def logits(self) -> Tensor:
        embeddings = self.kept(self.batch, "train")
        logits: Tensor = self.head(self.sam, self.batch.image, embeddings=embeddings)
        return logits

    def loss(self) -> Tensor:
        return DiceCE()(self.logits(), self.batch.mask)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_over_one_prefix_and_merged_adapters_do_the_same(method: str) -> None:
    run = Run(method)
    assert run.losses[-1] < 0.8 * run.losses[0]
    assert run.embedded == [2]
    if method == "decoder":
        return
    assert run.alone[-1] < run.alone[0]
    with torch.no_grad():
        unmerged = run.logits()
        with activate(run.sam, None):
            without = run.logits()
        run.adapters.merge()
        merged: Tensor = run.head(run.sam, run.batch.image)
    assert torch.dist(merged, unmerged) < 0.02 * torch.dist(without, unmerged)
