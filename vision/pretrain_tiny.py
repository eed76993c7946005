"""`polyadapt vision pretrain-tiny`: make the tiny ViT's weights from generated letters.

One core, minutes, the same bits for the same seed, number of threads and library versions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..core.cli import OneLineParser
from ..core.container import write_atomically
from ..core.errors import AdaptError
from ..core.threads import on_threads
from .glyphs import CLASSES, HELD_OUT_FONTS, TRAINING_FONTS, Glyphs
from .tiny_vit import DATA_CONFIG, PRETRAINING_HEAD, tiny_vit

# 226 s on one core; batches of 128 cost twice as much a step.
STEPS = 2400
BATCH_SIZE = 64
PEAK_LR = 2e-3
WEIGHT_DECAY = 0.05
_EVALUATED = 2000  # distorted letters, for each of the two figures


def main(argv: Sequence[str]) -> int:
    """Run the command; prints progress and the two accuracies."""
    parser = OneLineParser(prog="polyadapt vision pretrain-tiny", description=__doc__)
    parser.add_argument("--out", required=True, help="file to write (.safetensors)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1, help="a part of what fixes the bits")
    asked = parser.parse_args(argv)
    pretrain(Path(asked.out), asked.seed, asked.steps, asked.threads)
    print(f"written: {asked.out}")
    return 0


def pretrain(out: Path, seed: int = 0, steps: int = STEPS, threads: int = 1) -> dict[str, float]:
    """Train the tiny ViT to name letters, write its weights and that classifier, atomically.

    Returns the shares of freshly distorted letters that are named right: `training_fonts` and
    `held_out_fonts`. Raises `AdaptError` for steps or threads below 1 and a folder that is not
    there.
    """
    from safetensors.torch import save

    if steps < 1 or threads < 1:
        raise AdaptError(f"steps={steps} and threads={threads} must both be at least 1")
    if not out.parent.is_dir():
        raise AdaptError(f"cannot write {out}: the folder {out.parent} does not exist")
    glyphs = Glyphs(TRAINING_FONTS)
    with torch.random.fork_rng(devices=[]), on_threads(threads):
        torch.manual_seed(seed)
        model = tiny_vit(pretrained=False)
        head = nn.Linear(model.num_features, len(CLASSES))
        both = nn.Sequential(model, head)
        _train(both, glyphs, steps, seed)
        both.eval()
        found = {
            "training_fonts": accuracy(both, glyphs, seed + 1),
            "held_out_fonts": accuracy(both, Glyphs(HELD_OUT_FONTS), seed + 1),
        }
    print(", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in found.items()))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    head_state = {PRETRAINING_HEAD + name: t for name, t in head.state_dict().items()}
    # One entry only: safetensors writes several in a random order, and the bits would differ.
    origin = {"pretraining": f"seed {seed}, {steps} steps, {threads} thread(s)"}
    write_atomically(out, save({**state, **head_state}, origin))
    return found


def normalised(images: Tensor) -> Tensor:
    """Grey images [n, 1, h, w] from 0 to 1 -> [n, 3, h, w] as the backbone wants them."""
    mean, std = DATA_CONFIG["mean"][0], DATA_CONFIG["std"][0]
    scaled: Tensor = (images - mean) / std
    return scaled.expand(-1, 3, -1, -1)


@torch.inference_mode()
def accuracy(model: nn.Module, glyphs: Glyphs, seed: int) -> float:
    """The share of freshly distorted letters that the model names right."""
    images, labels = glyphs.sample(_EVALUATED, Generator().manual_seed(seed))
    return float((model(normalised(images)).argmax(1) == labels).double().mean())


def _train(model: nn.Module, glyphs: Glyphs, steps: int, seed: int) -> None:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0},
        ],
        lr=PEAK_LR,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=steps + 1, pct_start=0.1
    )
    generator, started = Generator().manual_seed(seed), time.perf_counter()
    for step in range(1, steps + 1):
        images, labels = glyphs.sample(BATCH_SIZE, generator)
        loss = F.cross_entropy(model(normalised(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 300 == 0 or step == steps:
            seconds = time.perf_counter() - started
            print(f"step {step} of {steps}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
