"""Block-LoRA against LoRA on a CLIP: numbers, multiply-adds, time and memory of a step.

Nominal rank 8 on q, k and v of both towers of open_clip's ViT-B/32 with random weights and split
attention, cut into n = 1, 2, 4, 8 blocks in both readings (arXiv 2501.16720; n = 1 is LoRA), and
LoRA of rank 8 / n, which is what `split="rank"` is in the end. Multiply-adds are torch's count of a
forward less the frozen one's. A step is forward, backward and AdamW on images and prompts.

Run: python benchmarks/block_lora.py [--rounds 5] [--images 8] [--classes 10]
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from polyadapt.benchmarks.rounds import interleaved, machine, one_thread
from polyadapt.benchmarks.training_step import kept, step
from polyadapt.core import AdapterSet, BlockLoRA, LoRA, Recipe, attach
from polyadapt.core.adapters.block_lora import as_plain
from polyadapt.vlm.names import sites_for
from polyadapt.vlm.split import split_attention

RANK, BLOCKS, MODEL = 8, (2, 4, 8), "ViT-B-32"


def recipes() -> dict[str, Recipe]:
    """Every row of the table by its name."""
    made: dict[str, Recipe] = {"LoRA r8": LoRA(rank=RANK, alpha=1, scaling="rank_stabilised")}
    for n in BLOCKS:
        made[f"rank split, n = {n}"] = BlockLoRA(rank=RANK, blocks=n)
        made[f"input split, n = {n}"] = BlockLoRA(rank=RANK, blocks=n, split="input")
        made[f"LoRA r{RANK // n}"] = BlockLoRA(rank=RANK, blocks=n).plain()
    return made


def clip(recipe: Recipe | None) -> tuple[Any, AdapterSet | None]:
    """The same model every time, and its set."""
    torch.manual_seed(0)
    model: Any = open_clip.create_model(MODEL, pretrained=None)
    split_attention(model)
    model.requires_grad_(False)
    return model, None if recipe is None else attach(model, recipe, sites_for(model))


def loss_of(model: Any, images: Tensor, texts: Tensor) -> Tensor:
    """Cross entropy of images with the prompts of all classes."""
    logits = 100 * model.encode_image(images, normalize=True) @ model.encode_text(texts, True).T
    return F.cross_entropy(logits, torch.arange(len(images)) % len(texts))


def multiply_adds(model: nn.Module, images: Tensor, texts: Tensor) -> int:
    """Of a forward: torch counts two operations for each."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        loss_of(model, images, texts)
    return int(counter.get_total_flops()) // 2


def exported(made: AdapterSet) -> int:
    """Numbers of the set as it is served: arms summed, A written out."""
    if not isinstance(made.recipe, BlockLoRA):
        return made.trainable_count()
    return sum(t.numel() for t in as_plain(made)[2].values())


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("rounds", 5), ("images", 8), ("classes", 10)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # open_clip says that the weights are random
    one_thread()
    print(machine("open-clip-torch"))
    images = torch.randn(asked.images, 3, 224, 224)
    words = [f"a photo of thing number {n}." for n in range(asked.classes)]
    texts = open_clip.get_tokenizer(MODEL)(words)
    print(f"{MODEL}, q, k, v of both towers; {asked.images} images, {asked.classes} prompts")
    base = multiply_adds(clip(None)[0], images, texts)
    print(f"frozen: {base / 1e9:.2f} G multiply-adds in a forward")
    calls, told = {}, {}
    for name, recipe in recipes().items():
        model, made = clip(recipe)
        assert made is not None
        more = (multiply_adds(model, images, texts) - base) / 1e6
        size = kept(model, images, texts, loss_of=loss_of)
        counts = f"{made.trainable_count():,} trained, {exported(made):,} served"
        told[name] = f"{counts}; {more:.1f} M multiply-adds more; {size:.0f} MiB kept"
        calls[name] = step(model, images, texts, loss_of=loss_of)
    taken = interleaved(calls, asked.rounds)
    first = next(iter(calls))
    for name in calls:
        ratio = "" if name == first else f"; {taken.line(name, to=first)}"
        print(f"{name}: {told[name]}{ratio}", flush=True)


if __name__ == "__main__":
    main()
