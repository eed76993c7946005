"""Accuracy of adapters on DINOv2 and a CIFAR-10 slice: every method starts from the same head.

The head is a logistic regression on the frozen features, converged. Each method's learning rate is
chosen on a tenth of the training images (the first seed's, `--tune-epochs` on the others), then it
is trained on all of them.

Run: python benchmarks/quality.py DATA.npz [--seeds 0,1,2] [--epochs 5] [--methods LoRA,MoSA]
DATA.npz has train_images, train_labels, test_images and test_labels. About 5 minutes of one core
per method and seed, and half of that for the learning rates (MoSA twice as much).
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from polyadapt.benchmarks.rounds import machine, one_thread
from polyadapt.core import AdapterTune, FullFineTuning, LoRA, MoSA, Recipe
from polyadapt.core.order import epoch_loader
from polyadapt.vision.backbones import OfflineDINOv2
from polyadapt.vision.fixed_features import LinearHead, logistic_regression
from polyadapt.vision.task import ImageClassification


@dataclass(frozen=True)
class Method:
    """A recipe, its sites, and the learning rates that are tried."""

    recipe: Recipe
    rates: tuple[float, ...]
    at: str | None = None


METHODS = {
    "LoRA": Method(LoRA(rank=8), (3e-4, 1e-3, 3e-3), "blocks.*.attn.qkv[q,v]"),
    "AdapterTune": Method(AdapterTune(rank=8), (3e-4, 1e-3, 3e-3)),
    "MoSA": Method(MoSA(rank=8), (3e-4, 1e-3, 3e-3)),
    "FullFineTuning": Method(FullFineTuning(), (3e-6, 1e-5, 3e-5)),
}


@dataclass(frozen=True)
class Part:
    """Prepared images [n, 3, s, s] and labels [n]."""

    images: Tensor
    labels: Tensor

    def pick(self, index: Tensor) -> Part:
        return Part(self.images[index], self.labels[index])


def read(path: Path) -> tuple[Part, Part]:
    """Training and test images as the backbone wants them."""
    spec = OfflineDINOv2()
    wants, arrays = spec.preprocessing(spec.build()), np.load(path)

    def part(name: str) -> Part:
        prepared = [wants(Image.fromarray(image)) for image in arrays[f"{name}_images"]]
        return Part(torch.stack(prepared), torch.from_numpy(arrays[f"{name}_labels"]).long())

    return part("train"), part("test")


@torch.inference_mode()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(100)])


def first_stage(train: Part) -> LinearHead:
    """The head that all methods start from."""
    return logistic_regression(outputs(OfflineDINOv2().build().eval(), train.images), train.labels)


def trained(
    method: Method, head: LinearHead, train: Part, lr: float, epochs: int, seed: int
) -> ImageClassification:
    torch.manual_seed(seed)
    classes = [str(n) for n in range(len(head.bias))]
    task = ImageClassification(
        OfflineDINOv2(), method.recipe, method.at, classes=classes, lr=lr, seed=seed
    )
    task.head.load_state_dict({"weight": head.weight, "bias": head.bias})
    loader = epoch_loader(TensorDataset(train.images, train.labels), 32, seed, drop_last=True)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, loader)
    return task.eval()


def accuracy(task: nn.Module, part: Part) -> float:
    return float((outputs(task, part.images).argmax(1) == part.labels).double().mean())


def chosen_rate(method: Method, train: Part, epochs: int, seed: int) -> float:
    """The learning rate that does best on a tenth of the training images."""
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    held, rest = train.pick(order[: len(order) // 10]), train.pick(order[len(order) // 10 :])
    head = first_stage(rest)
    scores = {
        lr: accuracy(trained(method, head, rest, lr, epochs, seed), held) for lr in method.rates
    }
    print(
        "  held-out tenth: " + ", ".join(f"lr {lr:g} {s:.1%}" for lr, s in scores.items()),
        flush=True,
    )
    return max(scores, key=lambda lr: (scores[lr], -lr))


def report(
    name: str, train: Part, test: Part, tune_epochs: int, epochs: int, seeds: Sequence[int]
) -> None:
    """One method with its own learning rate, all seeds."""
    method, begin = METHODS[name], time.process_time()
    print(f"{name}:", flush=True)
    rate = chosen_rate(method, train, tune_epochs, seeds[0])
    head = first_stage(train)
    found = [100 * accuracy(trained(method, head, train, rate, epochs, s), test) for s in seeds]
    spread = f" +- {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    each = " ".join(f"{value:.1f}" for value in found)
    print(
        f"  lr {rate:g}: {statistics.mean(found):.1f}{spread} % (seeds"
        f" {','.join(map(str, seeds))}: {each}), {time.process_time() - begin:.0f} CPU s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--tune-epochs", type=int, default=1, help="epochs per learning rate tried")
    parser.add_argument("--methods", default=",".join(METHODS))
    asked = parser.parse_args()
    one_thread()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # Lightning's advice on workers and intervals
    train, test = read(asked.data)
    head = first_stage(train)
    print(machine("timm", "lightning"))
    print(
        f"DINOv2 ViT-S/14, {len(train.labels)} training and {len(test.labels)} test images of"
        f" {train.images.shape[-1]} pixels, {asked.epochs} epochs from the same head,"
        f" learning rates tried for {asked.tune_epochs}"
    )
    features = outputs(OfflineDINOv2().build().eval(), test.images)
    print(f"logistic regression on frozen features: {head.accuracy(features, test.labels):.1%}")
    for name in asked.methods.split(","):
        seeds = [int(seed) for seed in asked.seeds.split(",")]
        report(name, train, test, asked.tune_epochs, asked.epochs, seeds)


if __name__ == "__main__":
    main()
