"""What `recompute="cheap"` saves and costs: LoRA r16 on all linear layers of ViT-S, batch 8.

Activations are the storages that autograd holds for backward after the forward, each counted once,
without parameters and buffers. `saved_tensors_hooks` sees what autograd itself saves and the inputs
of checkpointed blocks; `recompute` asks torch to route through the hooks what selective
checkpointing keeps in a cache of its own, so nothing escapes the count. A step is forward, loss and
backward; CPU seconds of the one thread are told beside the wall's, as other work on the machine
stretches the latter. Run: python benchmarks/recompute.py [--rounds 7] [--without-peft]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyadapt.benchmarks.rounds import Times, interleaved, machine, one_thread
from polyadapt.core import LoRA, attach, recompute

RANK, BATCH, MIB = 16, 8, 2**20
AT = "blocks.*.{attn.qkv,attn.proj,mlp.fc1,mlp.fc2}"
IMAGES = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(BATCH)


def vit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=10)
    return model


def ours() -> nn.Module:
    model = vit()
    made = attach(model, LoRA(rank=RANK), AT, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(2))
    return model


def theirs() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
    model: Any = get_peft_model(vit(), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    return model.base_model.model  # type: ignore[no-any-return]


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(IMAGES), LABELS)


def gradients(model: nn.Module) -> list[Tensor]:
    """One step, from no gradients."""
    model.zero_grad()
    loss_of(model).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def activations(model: nn.Module) -> float:
    """MiB held between forward and backward."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # or an address could be used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model)
    del loss
    return sum(sizes.values()) / MIB


def with_cpu_seconds(step: Callable[[], Any], seconds: list[float]) -> Callable[[], None]:
    def call() -> None:
        begin = time.process_time()
        step()
        seconds.append(time.process_time() - begin)

    return call


def main(rounds: int, with_peft: bool) -> None:
    one_thread()
    print(machine("timm", *(["peft"] if with_peft else [])))
    plain, cheap = ours(), ours()
    recompute(cheap)
    models = {"LoRA": plain, "LoRA, recompute": cheap}
    if with_peft:
        models["PEFT"] = theirs()
    held = {name: activations(model) for name, model in models.items()}
    for name, amount in held.items():
        print(f"{name}: {amount:.1f} MiB of activations, {amount / held['LoRA']:.3f} of LoRA")
    pairs = zip(gradients(plain), gradients(cheap), strict=True)
    print("gradients have the same bits:", all(torch.equal(a, b) for a, b in pairs))
    cpu: dict[str, list[float]] = {name: [] for name in models}
    steps = {n: with_cpu_seconds(partial(gradients, m), cpu[n]) for n, m in models.items()}
    wall = interleaved(steps, rounds)
    for what, times in (
        ("wall", wall),
        ("CPU", Times({name: own[-rounds:] for name, own in cpu.items()})),
    ):
        for name in [name for name in models if name != "LoRA"]:
            print(f"step, {what}: {times.line(name, 'LoRA')}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--without-peft", action="store_true")
    asked = parser.parse_args()
    main(asked.rounds, not asked.without_peft)
