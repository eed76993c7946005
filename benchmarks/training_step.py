"""A training step on all linear layers of ViT-S: LoRA and DoRA against PEFT, and what they keep.

Run: python benchmarks/training_step.py [--rounds 9] [--batch 8]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import timm
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from polyadapt.benchmarks.rounds import interleaved, machine, one_thread
from polyadapt.core import DoRA, LoRA, attach

AT = ["blocks.*.attn.qkv", "blocks.*.attn.proj", "blocks.*.mlp.fc1", "blocks.*.mlp.fc2"]
THEIRS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"


def model(kind: str) -> nn.Module:
    """ViT-S with random weights under one method, rank 16."""
    torch.manual_seed(0)
    made = timm.create_model("vit_small_patch16_224").train()
    if kind.startswith("PEFT"):
        dora = "DoRA" in kind
        config = LoraConfig(r=16, lora_alpha=16, target_modules=THEIRS, use_dora=dora)
        return inject_adapter_in_model(config, made)
    attach(made, {"LoRA": LoRA, "DoRA": DoRA}[kind](rank=16), AT)
    return made


def squares(made: nn.Module, images: Tensor) -> Tensor:
    """A loss that needs no labels."""
    loss: Tensor = made(images).square().mean()
    return loss


def step(
    made: nn.Module, *inputs: Tensor, loss_of: Callable[..., Tensor] = squares
) -> Callable[[], Any]:
    """Forward, backward and an AdamW step."""
    optimiser = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-4)

    def call() -> None:
        optimiser.zero_grad()
        loss_of(made, *inputs).backward()
        optimiser.step()

    return call


def kept(made: nn.Module, *inputs: Tensor, loss_of: Callable[..., Tensor] = squares) -> float:
    """MiB of activations that autograd keeps for backward: storages, each once, not parameters."""
    own = {p.untyped_storage().data_ptr() for p in made.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(made, *inputs)
    total = sum(seen.values()) / 2**20
    del loss
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    asked = parser.parse_args()
    one_thread()
    print(machine("timm", "peft"))
    images = torch.randn(asked.batch, 3, 224, 224)
    kinds = ("LoRA", "PEFT LoRA", "DoRA", "PEFT DoRA")
    made = {kind: model(kind) for kind in kinds}
    taken = interleaved({kind: step(made[kind], images) for kind in kinds}, asked.rounds)
    print(f"ViT-S, 48 linear layers, rank 16, batch {asked.batch}: a step")
    for one, other in (("LoRA", "PEFT LoRA"), ("DoRA", "LoRA"), ("PEFT DoRA", "PEFT LoRA")):
        print("  " + taken.line(one, to=other))
    print("activations kept for backward, MiB:")
    sizes = {kind: kept(made[kind], images) for kind in kinds}
    for kind in kinds:
        print(f"  {kind}: {sizes[kind]:.0f}, {sizes[kind] / sizes['LoRA']:.2f} of LoRA")


if __name__ == "__main__":
    main()
