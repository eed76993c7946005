"""What attaching, switching and saving cost: LoRA on the 48 linear layers of ViT-B.

Run: python benchmarks/attach_switch_save.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

from polyadapt.benchmarks.rounds import interleaved, machine, one_thread
from polyadapt.core import AdapterSet, LoRA, attach, sets_of, store, switch
from polyadapt.core.fingerprint import fingerprint

AT = ["blocks.*.attn.qkv", "blocks.*.attn.proj", "blocks.*.mlp.fc1", "blocks.*.mlp.fc2"]
RECIPE = LoRA(rank=16)


class ByHand(nn.Module):
    """The least that a LoRA layer can be."""

    def __init__(self, base: nn.Linear, rank: int = 16) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.empty(rank, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x) + x @ self.A.t() @ self.B.t()
        return y


def vit() -> nn.Module:
    return timm.create_model("vit_base_patch16_224").eval()


def wrapped(model: nn.Module) -> None:
    """Every layer replaced by a `ByHand`."""
    model.requires_grad_(False)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.qkv, block.attn.proj = ByHand(block.attn.qkv), ByHand(block.attn.proj)
        block.mlp.fc1, block.mlp.fc2 = ByHand(block.mlp.fc1), ByHand(block.mlp.fc2)


def attaching(rounds: int) -> None:
    """Ours, PEFT's, by hand; each taken out again outside of the timing."""
    models = {name: vit() for name in ("attach", "PEFT inject", "by hand")}
    plain = {name: dict(model.named_modules()) for name, model in models.items()}
    config = LoraConfig(r=16, target_modules=r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])")

    def restore(name: str) -> None:
        for path, module in plain[name].items():
            parent, _, child = path.rpartition(".")
            if path:
                plain[name][parent]._modules[child] = module
        models[name].__dict__.pop("peft_config", None)

    ours = models["attach"]
    times = interleaved(
        {
            "attach": lambda: attach(ours, RECIPE, AT, "a"),
            "PEFT inject": lambda: inject_adapter_in_model(config, models["PEFT inject"]),
            "by hand": lambda: wrapped(models["by hand"]),
        },
        rounds,
        warm=2,
        after={
            "attach": lambda: sets_of(ours)["a"].detach(),
            "PEFT inject": lambda: restore("PEFT inject"),
            "by hand": lambda: restore("by hand"),
        },
    )
    print(times.line("attach", to="by hand"))
    print(times.line("PEFT inject", to="by hand"))


def beside(rounds: int) -> None:
    """The 32nd set against the 2nd, and switching among 2 and 32."""
    few, many = vit(), vit()
    for n in range(31):
        attach(many, RECIPE, AT, f"s{n}").freeze()
    attach(few, RECIPE, AT, "s0").freeze()

    def one_more(model: nn.Module) -> Callable[[], Any]:
        return lambda: attach(model, RECIPE, AT, "new")

    calls = {"the 2nd set": one_more(few), "the 32nd set": one_more(many)}
    after = {
        "the 2nd set": lambda: sets_of(few)["new"].detach(),
        "the 32nd set": lambda: sets_of(many)["new"].detach(),
    }
    times = interleaved(calls, rounds, 2, after)
    print(times.line("the 32nd set", to="the 2nd set"))
    attach(few, RECIPE, AT, "s1")
    attach(many, RECIPE, AT, "s31")
    for model in (few, many):
        for adapters in sets_of(model).values():
            adapters.trainable = True

    def back_and_forth(model: nn.Module) -> Callable[[], Any]:
        def call() -> None:
            for name in ("s0", "s1") * 50:
                switch(model, name)

        return call

    calls = {"switch among 2": back_and_forth(few), "switch among 32": back_and_forth(many)}
    times = interleaved(calls, rounds, 2)
    print(times.line("switch among 32", to="switch among 2"))
    print(f"one switch among 32: {1e4 * times.median('switch among 32'):.0f} microseconds")


def saving(rounds: int) -> None:
    """Against a bare safetensors write of the same tensors; the fingerprint apart."""
    model = vit()
    adapters = attach(model, RECIPE, AT)
    KNOWN.update(fingerprint(model, adapters.sites))
    tensors = {key: t.detach().contiguous() for key, t in adapters.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        times = interleaved(
            {
                "save": lambda: save_without_fingerprint(adapters, Path(folder, "ours")),
                "fingerprint": lambda: fingerprint(model, adapters.sites),
                "bare write": lambda: save_file(tensors, Path(folder, "bare.safetensors")),
            },
            rounds,
        )
    print(times.line("save", to="bare write"))
    print(times.line("fingerprint", to="bare write"))


def save_without_fingerprint(adapters: AdapterSet, path: Path) -> None:
    """`save` with the backbone's digests known beforehand."""
    with mock.patch.object(store, "fingerprint", return_value=KNOWN):
        adapters.save(path)


KNOWN: dict[str, str] = {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    one_thread()
    print(machine("timm", "peft", "safetensors"))
    attaching(asked.rounds)
    beside(asked.rounds)
    saving(asked.rounds)


if __name__ == "__main__":
    main()
