"""An epoch of LoRA on the last 2 of 12 blocks of ViT-Ti at 96 px, with and without PrefixCache.

Steps alone (forward, backward, AdamW) on images that are ready in memory, in another order each
epoch; without a validation part, with which the ratio would grow. Filling the cache is told apart:
it is paid once. Run: python benchmarks/cached_prefix.py [--rounds 9] [--images 64]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyadapt.benchmarks.rounds import interleaved, machine, one_thread
from polyadapt.core import LoRA, PrefixCache, attach

AT, RANK, BATCH, SIZE = "blocks.{10,11}.attn.qkv", 8, 16, 96
Logits = Callable[[Tensor, Tensor], Tensor]


def vit() -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, num_classes=10)
    attach(made, LoRA(rank=RANK), AT, generator=torch.Generator().manual_seed(1))
    return made.train()


def epochs(model: nn.Module, logits: Logits, images: Tensor) -> Callable[[], None]:
    """A call is the next epoch."""
    own = torch.Generator().manual_seed(2)
    labels = torch.arange(len(images)) % 10
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def epoch() -> None:
        for numbers in torch.randperm(len(images), generator=own).split(BATCH):
            optimiser.zero_grad()
            F.cross_entropy(logits(images[numbers], numbers), labels[numbers]).backward()
            optimiser.step()

    return epoch


def main(rounds: int, number: int) -> None:
    one_thread()
    print(machine("timm"))
    images = torch.randn(number, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    plain, kept = vit(), vit()
    cache = PrefixCache(kept, samples=number)
    begin = time.perf_counter()
    for numbers in torch.arange(number).split(BATCH):
        cache.fill(images[numbers], numbers)
    filling = time.perf_counter() - begin
    calls = {
        "cached": epochs(kept, cache, images),
        "plain": epochs(plain, lambda batch, _: plain(batch), images),
    }
    taken = interleaved(calls, rounds)
    print(f"an epoch of {number} images, batch {BATCH}: {taken.line('cached', to='plain')}")
    print(f"filling, once: {1e3 * filling:.3g} ms, {len(cache)} states")
    pairs = list(zip(plain.parameters(), kept.parameters(), strict=True))
    largest = max(float((a - b).detach().abs().max()) for a, b in pairs if a.requires_grad)
    moved = max(float(a.detach().abs().max()) for a, _ in pairs if a.requires_grad)
    print(f"adapters differ by at most {largest:.1e} after {rounds + 1} epochs, of {moved:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=64)
    asked = parser.parse_args()
    main(asked.rounds, asked.images)
