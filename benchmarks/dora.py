"""DoRA over LoRA on one linear layer of width 4096: time and peak memory; PEFT's in the same run.

Run: python benchmarks/dora.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from polyadapt.benchmarks.rounds import interleaved, machine, one_thread
from polyadapt.core import DoRA, LoRA, attach

WIDTH = 4096
CASES = ((16, 512), (16, 64), (384, 64))


def model(kind: str, rank: int) -> nn.Module:
    """One linear layer under `LoRA`, `DoRA`, `PEFT LoRA` or `PEFT DoRA`."""
    torch.manual_seed(0)
    made: nn.Module = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    if kind.startswith("PEFT"):
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], use_dora="DoRA" in kind)
        made = inject_adapter_in_model(config, made)
    elif kind != "frozen":
        attach(made, {"LoRA": LoRA, "DoRA": DoRA}[kind](rank=rank), "0")
    for name, parameter in made.named_parameters():
        if name.endswith(".B") or "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return made


def step(made: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Forward and backward."""

    def call() -> None:
        made.zero_grad()
        made(x).sum().backward()

    return call


def times(rank: int, tokens: int, rounds: int) -> None:
    """Factors change before each step, as in training; then frozen factors in eval."""
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    kinds = ("LoRA", "DoRA", "PEFT LoRA", "PEFT DoRA")
    made = {kind: model(kind, rank) for kind in kinds}
    print(f"rank {rank}, {tokens} tokens, forward and backward, factors changed:")
    taken = interleaved({kind: step(made[kind], x) for kind in kinds}, rounds)
    print("  " + taken.line("DoRA", to="LoRA"))
    print("  " + taken.line("PEFT DoRA", to="PEFT LoRA"))
    for one in made.values():
        one.eval().requires_grad_(False)
    calls = {kind: lambda one=one: one(x.detach()) for kind, one in made.items()}
    taken = interleaved(calls, rounds)
    print("  frozen factors, forward only (ours keeps the norm):")
    print("  " + taken.line("DoRA", to="LoRA"))
    print("  " + taken.line("PEFT DoRA", to="PEFT LoRA"))


def peak(kind: str, rank: int, tokens: int) -> float:
    """MiB that a step needs beyond what is resident before it, in a process of its own."""
    command = [sys.executable, __file__, "--peak", kind, str(rank), str(tokens)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(kind: str, rank: int, tokens: int) -> None:
    one_thread()
    made, x = model(kind, rank), torch.randn(tokens, WIDTH, requires_grad=True)
    small = step(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8, requires_grad=True))
    small()  # what autograd allocates once
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak until here
    before = resident("VmHWM")
    step(made, x)()
    print((resident("VmHWM") - before) / 1024)


def resident(field: str) -> int:
    """KiB of this process, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak:
        print_peak(asked.peak[0], int(asked.peak[1]), int(asked.peak[2]))
        return
    one_thread()
    print(machine("peft"))
    for rank, tokens in CASES:
        times(rank, tokens, asked.rounds)
    print("peak memory of a step, rank 16, 512 tokens, MiB beyond the frozen model:")
    for kind in ("LoRA", "DoRA", "PEFT LoRA", "PEFT DoRA"):
        peaks = sorted(peak(kind, 16, 512) for _ in range(3))
        print(f"  {kind}: {peaks[1]:.0f} (3 processes: {peaks[0]:.0f} to {peaks[2]:.0f})")


if __name__ == "__main__":
    main()
