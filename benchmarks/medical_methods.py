"""The methods that `medical_chase` compares: each trains the same parts of SAM's decoder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from polyadapt.benchmarks.medical_records import Record, Segment, mean_dice, measured
from polyadapt.core import (
    SALT,
    SSAM,
    BitFit,
    FullFineTuning,
    HeadOnly,
    LoRA,
    Recipe,
    attach,
    select,
)
from polyadapt.vision.medical.backbones import LiteMedSAM
from polyadapt.vision.medical.data import SegmentationData
from polyadapt.vision.medical.losses import DiceCE
from polyadapt.vision.medical.sam import SegmentAnything
from polyadapt.vision.medical.task import Segmentation
from polyadapt.vision.medical.unet import PatchUNet, pairs, segment, train

Keep = Literal["none", "memory"]
SALT_OURS = SALT(top=0.1, rank=16)
# In the order of a report. By the validation photographs' Dice alone, see `medical_rates`, in the
# quick step's setting; a step may have others.
RATES: Mapping[str, float] = {
    "decoder": 3e-4,
    "SALT": 1e-3,
    "LoRA equal": 3e-4,
    "LoRA r4": 1e-3,
    "S-SAM": 1e-3,
    "BitFit": 1e-3,
    "LoRA r256": 1e-3,
    "full": 3e-4,
}
SAM_METHODS = tuple(RATES)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the methods of a step have in common.

    at: patterns of the layers whose weights are adapted; BitFit and full fine-tuning take what they
    train of the blocks that hold such layers.
    """

    size: int
    at: str
    blocks: tuple[str, ...]
    epochs: int
    keep: Keep
    batch: int = 2
    rates: Mapping[str, float] = field(default_factory=lambda: RATES)


def recipe_of(method: str, setting: Setting, sam: SegmentAnything) -> tuple[Recipe, Any]:
    """The recipe of a method and its sites."""
    if method == "decoder":
        return HeadOnly(), None
    if method == "full":
        return FullFineTuning(), [f"{block}.**" for block in setting.blocks]
    if method == "BitFit":
        names = BitFit().default_at(sam)
        return BitFit(), [name for name in names if name.startswith(setting.blocks)]
    if method == "LoRA equal":
        return LoRA(rank=equal_rank(sam, setting.at)), setting.at
    return {
        "LoRA r4": LoRA(rank=4),
        "LoRA r256": LoRA(rank=256, ranks=_narrower(sam, setting.at, 256)),
        "S-SAM": SSAM(),
        "SALT": SALT_OURS,
    }[method], setting.at


def _narrower(sam: SegmentAnything, at: str, rank: int) -> dict[str, int]:
    """The full rank of those sites whose weight has no such rank."""
    return {s.name: min(s.shape) for s in select(sam, at) if min(s.shape) < rank}


def equal_rank(sam: SegmentAnything, at: str) -> int:
    """The rank at which LoRA trains most nearly as many numbers as SALT at the same sites."""
    counts = [_count(sam, recipe, at) for recipe in (SALT_OURS, LoRA(rank=1))]
    return max(1, round(counts[0] / counts[1]))


def _count(sam: SegmentAnything, recipe: Recipe, at: str) -> int:
    adapters = attach(sam, recipe, at=at, name="counted")
    count = sum(p.numel() for p in adapters.trained().values())
    adapters.detach()
    return count


class Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, number: int
    ) -> None:
        self.found.append(float(outputs["loss"]))


def sam_task(method: str, setting: Setting, seed: int, rate: float | None = None) -> Segmentation:
    """A task to be trained: the whole decoder, a class token, a box around the whole square."""
    torch.manual_seed(seed)
    backbone = LiteMedSAM(img_size=setting.size)
    recipe, at = recipe_of(method, setting, backbone.build())
    return Segmentation(
        backbone,
        recipe,
        at,
        whole_box=True,
        lr=setting.rates[method] if rate is None else rate,
        seed=seed,
        cache_prefix=setting.keep,
    )


def run_sam(
    method: str, setting: Setting, data: SegmentationData, seed: int, folder: Path
) -> Record:
    """Train on the data's training pictures, score the last state on the test's."""
    task, losses, spent = fitted(sam_task(method, setting, seed), setting.epochs, data)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "adapter.safetensors"
    task.save_adapter(file)
    adapters = sum(p.numel() for p in task.adapters.trained().values())
    counts = adapters, adapters + sum(p.numel() for p in task.head.parameters())
    rate = setting.rates[method]
    return _record(method, seed, rate, counts, file, losses, spent, of(task), data, folder)


def fitted(
    task: Segmentation, epochs: int, data: SegmentationData
) -> tuple[Segmentation, list[float], float]:
    """The task after its training, the loss of every step, and the CPU seconds spent."""
    losses, begin = Losses(), time.process_time()
    quiet_trainer(epochs, losses).fit(task, datamodule=data)
    return task, losses.found, time.process_time() - begin


def of(task: Segmentation) -> Segment:
    """Masks of a trained task."""
    task.eval()

    @torch.inference_mode()
    def masks(pixels: Any) -> Any:
        logits = task(task.view(pixels)[None])[0]
        native = task.view.native(logits, pixels.shape[:2])[0]
        return (native > 0).numpy().astype(np.uint8)

    return masks


def run_unet(
    settings: PatchUNet, data: SegmentationData, seed: int, cpu_seconds: float, folder: Path
) -> Record:
    """A U-Net of its own; reading and preparing the pictures counts as training."""
    begin = time.process_time()
    given = pairs(data.cases("train"), settings)
    net = settings.build(seed)
    left = cpu_seconds - (time.process_time() - begin)
    found = train(net, given, settings, DiceCE(batch=True), seed=seed, cpu_seconds=left)
    spent = time.process_time() - begin
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "unet.pt"
    torch.save(net.state_dict(), file)

    def masks(pixels: Any) -> Any:
        return (segment(net, pixels, settings) > 0).numpy().astype(np.uint8)

    counts = 0, sum(p.numel() for p in net.parameters())
    return _record("U-Net", seed, settings.lr, counts, file, found, spent, masks, data, folder)


def _record(
    method: str,
    seed: int,
    rate: float,
    counts: tuple[int, int],
    file: Path,
    losses: Sequence[float],
    spent: float,
    masks: Segment,
    data: SegmentationData,
    folder: Path,
) -> Record:
    part = max(1, len(losses) // 10)
    val = mean_dice(measured(masks, data.cases("val"), overlap_only=True))
    return Record(
        method=method,
        seed=seed,
        rate=rate,
        adapters=counts[0],
        trained=counts[1],
        stored=file.stat().st_size,
        steps=len(losses),
        cpu_seconds=spent,
        first_loss=float(np.mean(losses[:part])),
        last_loss=float(np.mean(losses[-part:])),
        val_dice=val,
        pictures=measured(masks, data.cases("test"), folder),
    )


def quiet_trainer(epochs: int, *callbacks: Callback) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
