"""LoRA on the attention of open_clip's ViT-B/32 against PEFT: what is right, and what it costs.

Both have rank 2 on q, k, v and the output of all twelve attentions of the vision tower (PEFT has no
other choice there), random weights, no dropout; ours on split attention (`split_attention`) and on
open_clip's own. Correctness is told first: gradients, frozen weights after forwards with other
adapter values, two threads on one model, graph breaks under torch.compile. A step is forward,
backward and AdamW; a forward is in eval mode without grad.

Run: python benchmarks/vlm_peft.py [--rounds 9] [--batch 8]
"""

from __future__ import annotations

import argparse
import logging
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import open_clip
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from polyadapt.benchmarks.rounds import interleaved, machine, one_thread
from polyadapt.benchmarks.training_step import kept, step
from polyadapt.core import LoRA, attach, sets_of
from polyadapt.vlm.names import sites_for
from polyadapt.vlm.split import split_attention

RANK, MODEL = 2, "ViT-B-32"
KINDS = ("frozen", "split", "not split", "PEFT")
CALLS = 200
"""Forwards of a small tower: by each of two threads, and with values that move in between."""


class Eye(nn.Module):
    """The vision tower alone, under the name that image-text models have for it."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual(images)
        return features


def tower(kind: str, small: bool = False) -> nn.Module:
    """The vision tower, adapted in one of the ways; `small`: three blocks of width 64."""
    torch.manual_seed(0)
    if small:
        eye = open_clip.CLIPVisionCfg(
            layers=3, width=64, head_width=16, patch_size=8, image_size=32
        )
        reader = open_clip.CLIPTextCfg(width=16, heads=2, layers=1)
        model: Any = open_clip.CLIP(32, eye, reader)
    else:
        model = open_clip.create_model(MODEL, pretrained=None)
    if kind == "split":
        split_attention(model)
    made = Eye(model.visual).requires_grad_(False)
    if kind == "PEFT":
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=r".*resblocks\.\d+\.attn")
        return inject_adapter_in_model(config, made)
    if kind != "frozen":
        attach(made, LoRA(rank=RANK), sites_for(made, "vision", "qkvo"))
    return made


def moved(made: nn.Module) -> nn.Module:
    """With adapter values that do something."""
    for n, parameter in enumerate(p for p in made.parameters() if p.requires_grad):
        with torch.no_grad():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(n))
    return made


def without_gradient(made: nn.Module) -> str:
    """Adapter tensors that a backward leaves without a gradient."""
    images = torch.randn(2, 3, 32, 32)
    made.train()(images).square().mean().backward()
    trained = [p for p in made.parameters() if p.requires_grad]
    return f"{sum(p.grad is None for p in trained)} of {len(trained)} tensors without a gradient"


def out_projection() -> str:
    """What PEFT trains where its target is the output projection alone, or both."""
    told = []
    for targets in (["out_proj"], ["attn", "out_proj"]):
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
        made = inject_adapter_in_model(config, tower("frozen", small=True))
        try:
            told.append(f"{targets}: {without_gradient(made)}")
        except RuntimeError as error:
            told.append(f"{targets}: backward raises {str(error).splitlines()[0]!r}")
    return "; ".join(told)


def drift(kind: str) -> str:
    """How far frozen numbers are from before, after forwards with values that change."""
    made = tower(kind, small=True).eval()
    before = [p.detach().clone() for p in frozen(made)]
    for n in range(CALLS):
        with torch.no_grad():
            for parameter in (p for p in made.parameters() if p.requires_grad):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(n))
            made(torch.zeros(1, 3, 32, 32))
    pairs = zip(frozen(made), before, strict=True)
    most = max(float((a.detach() - b).abs().max()) for a, b in pairs)
    return f"frozen numbers differ by at most {most:.2g} after {CALLS} forwards"


def frozen(made: nn.Module) -> list[Tensor]:
    """All that is not trained, in the order of the sorted sizes and names."""
    held = sorted(((n, p) for n, p in made.named_parameters() if "lora" not in n.lower()))
    own = {id(p) for p in made.parameters() if p.requires_grad}
    return [p for _, p in held if id(p) not in own]


def threads(kind: str) -> str:
    """Calls of two threads on one model that fail or differ from a call alone."""
    made = moved(tower(kind, small=True)).eval()
    images = torch.randn(2, 1, 3, 32, 32)
    with torch.no_grad():
        alone = [made(x).clone() for x in images]
    wrong = [0, 0]

    def work(n: int) -> None:
        for _ in range(CALLS):
            try:
                with torch.no_grad():
                    same = torch.allclose(made(images[n]), alone[n], atol=1e-5)
            except (AttributeError, RuntimeError):  # how a model in pieces fails
                same = False
            wrong[n] += not same

    both = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    return f"{sum(wrong)} of {2 * CALLS} calls of two threads wrong or failing"


def breaks(kind: str) -> str:
    """Of three blocks, as dynamo counts them."""
    made = moved(tower(kind, small=True)).eval()
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch._dynamo.explain(made)(torch.randn(1, 3, 32, 32))
    return f"{found.graph_break_count} graph breaks"


def correctness() -> None:
    """A line for each way of adapting."""
    for kind in KINDS[1:]:
        told = [without_gradient(tower(kind, small=True)), drift(kind), threads(kind), breaks(kind)]
        print(f"  {kind}: {'; '.join(told)}", flush=True)
    print(f"  PEFT with other targets: {out_projection()}")


def forward(made: nn.Module, images: Tensor) -> Callable[[], Any]:
    """One call in eval mode, without grad."""
    made.eval()

    def call() -> None:
        with torch.no_grad():
            made(images)

    return call


def merged(made: nn.Module) -> nn.Module:
    """With the set folded into the weights."""
    (adapters,) = sets_of(made).values()
    adapters.merge()
    return made


def forwards(images: Tensor, rounds: int) -> None:
    """Adapted, merged and frozen."""
    made: Mapping[str, nn.Module] = {
        "frozen": tower("frozen"),
        "split, rank 2": moved(tower("split")),
        "not split, rank 2": moved(tower("not split")),
        "not split, merged": merged(moved(tower("not split"))),
        "PEFT": moved(tower("PEFT")),
    }
    taken = interleaved({name: forward(model, images) for name, model in made.items()}, rounds)
    for name in list(made)[1:]:
        print("  " + taken.line(name, to="frozen"))


def steps(images: Tensor, rounds: int) -> None:
    """Time of a step, and what autograd keeps for its backward."""
    made = {kind: tower(kind).train() for kind in KINDS[1:]}
    taken = interleaved({kind: step(made[kind], images) for kind in made}, rounds)
    for kind in ("split", "not split"):
        print("  " + taken.line(kind, to="PEFT"))
    sizes = {kind: kept(model, images) for kind, model in made.items()}
    told = ", ".join(f"{kind} {size:.0f}" for kind, size in sizes.items())
    print(f"  activations kept for backward, MiB: {told}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", module="peft")
    logging.getLogger().setLevel(logging.ERROR)  # open_clip says that the weights are random
    print(machine("open-clip-torch", "peft"))
    print("three blocks of width 64, q, k, v and output:")
    correctness()
    one_thread()
    images = torch.randn(asked.batch, 3, 224, 224)
    print(f"{MODEL}, vision tower, rank {RANK}, batch {asked.batch}, one thread")
    print("a forward (to reach: 1.1 of frozen, merged or at rank 2):")
    forwards(images, asked.rounds)
    print("a step (to reach: 0.9 of PEFT's):")
    steps(images, asked.rounds)


if __name__ == "__main__":
    main()
