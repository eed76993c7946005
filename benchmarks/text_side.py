"""The text side of a training step: 100 class prompts through CLIP's text tower, in every way.

ViT-B-32's text tower (12 blocks of width 512, random weights) under CLIP-LoRA, all prompts with
gradients. "whole context" encodes all 77 tokens of every prompt, the others what `shorter` leaves
of them. Gradients are compared in eval mode, where no dropout is drawn. Memory is that of live
tensors without the weights: every tensor that an operation returns, its storage once, until it is
freed; what one kernel needs for itself is not seen. A step is forward, loss and backward.

Run: python benchmarks/text_side.py [--rounds 5] [--chunk 25] (--rounds 0: memory alone)
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyadapt.benchmarks.rounds import interleaved, machine, one_thread
from polyadapt.core import attach, recompute
from polyadapt.vlm.adapters import CLIP_LORA
from polyadapt.vlm.backbones import OpenCLIP
from polyadapt.vlm.model import ImageText
from polyadapt.vlm.names import sites_for
from polyadapt.vlm.prompts import class_tokens
from polyadapt.vlm.text_features import encode

COLOURS = ["red", "green", "blue", "black", "white", "yellow", "brown", "grey", "orange", "pink"]
THINGS = ["fox", "car", "bird", "house", "boat", "flower", "chair", "fish", "tree", "bicycle"]
CLASSES = [" ".join(words) for words in product(COLOURS, THINGS)]
WHOLE, PLAIN = "whole context", "without padding"
Way: TypeAlias = tuple[ImageText, Tensor, int | None]
"""What `step` and `memory` are called with."""


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, those of `weights` excepted."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = weights
        self.alive: dict[int, Any] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive or storage.data_ptr() in self.weights:
            return
        self.alive[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.now += size
        self.most = max(self.most, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self.alive[key]
        self.now -= size


def tower(cheap: bool = False) -> ImageText:
    """The model with LoRA on its text tower; `cheap`: its blocks run again in backward."""
    spec = OpenCLIP(name="ViT-B-32", pretrained=None)
    pair = spec.image_text(spec.build())
    made = attach(pair.model, CLIP_LORA, sites_for(pair.model, "text"))
    with torch.no_grad():
        for n, parameter in enumerate(made.parameters()):
            parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(n))
    if cheap:
        recompute(pair.model)
    return pair


def loss_of(pair: ImageText, tokens: Tensor, chunk: int | None) -> Tensor:
    """Cross entropy of 32 images, whose features are constants here."""
    images = F.normalize(torch.randn(32, pair.width, generator=torch.Generator().manual_seed(1)))
    labels = torch.arange(32)
    return F.cross_entropy(100 * images @ encode(pair, tokens, chunk).T, labels)


def step(pair: ImageText, tokens: Tensor, chunk: int | None) -> list[Tensor]:
    """The gradients of one step."""
    pair.model.zero_grad()
    loss_of(pair, tokens, chunk).backward()
    return [p.grad for p in pair.model.parameters() if p.grad is not None]


def memory(pair: ImageText, tokens: Tensor, chunk: int | None) -> tuple[float, float]:
    """MiB alive between forward and backward, and at most in the step."""
    held = (*pair.model.parameters(), *pair.model.buffers(), tokens)
    pair.model.zero_grad()
    live = Live({tensor.untyped_storage().data_ptr() for tensor in held})
    with live:
        loss = loss_of(pair, tokens, chunk)
        between = live.now
        loss.backward()
    return between / 2**20, live.most / 2**20


def furthest(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference of two gradients, relative to the largest gradient."""
    pairs = zip(found, wanted, strict=True)
    most = max(float((one - other).abs().max()) for one, other in pairs)
    return most / max(float(tensor.abs().max()) for tensor in wanted)


def ways(chunk: int) -> Mapping[str, Way]:
    """By their names."""
    plain, cheap = tower(), tower(cheap=True)
    tokens = class_tokens(plain.tokenize, CLASSES)
    short = plain.shorter(tokens)
    print(f"{len(tokens)} prompts of {tokens.shape[1]} tokens, {short.shape[1]} without padding")
    return {
        WHOLE: (plain, tokens, None),
        PLAIN: (plain, short, None),
        "recompute": (cheap, short, None),
        f"chunks of {chunk}": (plain, short, chunk),
        f"chunks of {chunk}, recompute": (cheap, short, chunk),
    }


def deviations(rows: Mapping[str, Way]) -> dict[str, float]:
    """How far the gradients of each are from those of the first, in eval mode."""
    wanted, found = None, {}
    for name, how in rows.items():
        how[0].model.eval()
        gradients = [gradient.clone() for gradient in step(*how)]
        wanted = gradients if wanted is None else wanted
        found[name] = furthest(gradients, wanted)
        how[0].model.train()
    return found


def main(rounds: int, chunk: int) -> None:
    """Print memory, gradients and times."""
    one_thread()
    print(machine("open_clip_torch"))
    rows = ways(chunk)
    for name, far in deviations(rows).items():
        kept, most = memory(*rows[name])
        print(f"{name}: {kept:.1f} MiB kept for backward, at most {most:.1f} MiB in a step")
        if name != WHOLE:
            print(f"  gradients differ by {far:.1e} of the largest from those of the {WHOLE}")
    if rounds:
        taken = interleaved({name: partial(step, *how) for name, how in rows.items()}, rounds)
        print("a step:")
        for name in (name for name in rows if name != PLAIN):
            print("  " + taken.line(name, to=PLAIN))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=25)
    asked = parser.parse_args()
    main(asked.rounds, asked.chunk)
